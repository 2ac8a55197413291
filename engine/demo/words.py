"""The word lists from which the demo model's training text is made."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _split(
    "Maria John Aisha Wei Lena Omar Priya Tom Sofia Kenji Anna David Fatima Carlos Emma Noah "
    "Olga Raj Lucia Ben Alice Peter Julia Mark Nina Paul Laura Simon Clara Adam"
)
LAST_NAMES = _split(
    "Smith Jones Brown Lopez Silva Tanaka Weber Rossi Martin Khan Ali Chen Novak Murphy Clark "
    "Young Baker Hall Wood Stone Fischer Moreau Costa Hansen Patel"
)
PARTICLES = _split(
    "de van der von da di del la le bin ibn al el dos ten ter af av zu und y e san mac"
)
FUSED_PREFIXES = ("O'", "D'", "O\u2019", "L'", "Mc", "Mac", "al-", "Al-", "El-", "N'", "Ó ", "St. ")
SUFFIXES = (" Jr.", " Sr.", " II", " III")

# Syllable inventories: (onsets, nuclei, codas), one per family of sounds. They are no language;
# they spread the letters, so that the model learns to copy rather than to remember.
SYLLABLES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = tuple(
    (tuple(a.split()), tuple(b.split()), ("", "", *c.split()))
    for a, b, c in (
        (
            "b c d f g h j k l m n p r s t v w z br ch cl dr fr gr kr pl pr sh sl st tr th",
            "a e i o u ai ea ie oa ou",
            "n r s l t m x nd rt ck",
        ),
        (
            "b d g h k l m n p r s t v w sz cz rz zd ł ś ź ż ć dz wł św prz krz",
            "a e i o u y ą ę ó ia ie",
            "k c sz cz n ń ł ł ski ska wicz",
        ),
        (
            "b d d h j k l m n p r s š t v z ž č ř ď ť ň hr vl",
            "a á e é ě i í o u ů y ý",
            "k l n c č š v",
        ),
        (
            "b d đ g gi h kh l m n ng ngh nh ph q r s t th tr v x",
            (
                "a ă â e ê i o ô ơ u ư y ạ ả ấ ầ ậ ắ ặ ẹ ế ề ể ễ ệ ị ọ ố ồ ộ ớ ờ ợ ụ ủ ứ ừ ữ ự "
                "ỳ ươ uyê iê"
            ),
            "n ng nh c t m p ch",
        ),
        (
            "b d f g h j k l m n p r s t v bj sk sv þ ð hv kr gj fj",
            "a á e é i í o ó u ú y ý æ ø å ö ä au ei ey",
            "r n ur ar inn rún dóttir son sen gård ström",
        ),
        (
            "b c ç d f g ğ h k l m n p r s ş t v y z",
            "a e ı i o ö u ü â",  # noqa: RUF001
            "n r k l t ş ğ lu han gül oğlu",
        ),
        (
            "b gb d f g h j k kw l m mb n nd ng nk ny p r s sh t w y z ch tsh",
            "a e i o u ẹ ọ aa oo",
            "n m",
        ),
        (
            "b d dh f g gh h j k kh l m n q r s sh t th w y z",
            "a aa ai au e i ee o u ou",
            "d h l m n r s b f q k z",
        ),
        (
            "b p m f d t n l g k h j q x zh ch sh r z c s",
            "a ai ao e ei i ia iao ie iu o ou u ua ui uo ü",
            "n ng",
        ),
        ("k s sh t ts ch n h f m y r w g z j d b p ky ry", "a i u e o ō ū", "n"),
        (
            "b bh ch d dh g gh h j k kh l m n p ph r s sh t th v y tr pr kr shr",
            "a aa i ee u oo e ai o au",
            "n m l r sh nt nd rth",
        ),
        (
            "b c ch d f g gn h l ll m n ñ p qu r rr s t v z bl br cr",
            "a e i o u á é í ó ú ã õ ê ô â à è ì ò ia io ue ei ão",
            "n r s l z es ez",
        ),
        (
            "b c d f g h l m n p r s t ț ș v z br dr m str",
            "a e i o u ă â î ea oa ia",
            "n r s l escu eanu u",
        ),
        (
            "b cs d f g gy h k l m n ny p r s sz t ty v z zs",
            "a á e é i í o ó ö ő u ú ü ű",
            "n k r s l sz y",
        ),
        (
            "b br d ch dr gh k l ll m mh n r s sh t bh",
            "a á ao e é ea eo i í o ó oi u ú ui aoi",
            "n r l s d gh nn ll ch",
        ),
    )
)

# Letters for names made of nothing but letters: plain ones weigh more than marked ones.
PLAIN_LETTERS = "aeiourstlnmdkpbghvzcfjwyxq"
MARKED_LETTERS = (
    "àáâãäåāăąæçćčďđèéêëēėęěğģìíîïīįıķĺľłñńņňòóôõöøōőœŕřśşšșťțþùúûüūůűųŵýÿŷźżžðß"
    "ảạấầẩẫậắằẳẵặẻẽẹếềểễệỉịỏọốồổỗộớờởỡợủụứừửữựỳỷỹỵơưẓḥṭ"
)

# Scripts other than Latin: (first code point, last code point, letters in a word, has capitals).
SCRIPTS: tuple[tuple[int, int, tuple[int, int], bool], ...] = (
    (0x0430, 0x044F, (3, 10), True),  # Cyrillic
    (0x0430, 0x045F, (3, 10), True),  # Cyrillic with the letters of its other languages
    (0x03AC, 0x03CE, (3, 10), True),  # Greek
    (0x0561, 0x0586, (3, 9), True),  # Armenian
    (0x10D0, 0x10F0, (3, 9), False),  # Georgian
    (0x05D0, 0x05EA, (3, 7), False),  # Hebrew
    (0x0620, 0x064A, (3, 8), False),  # Arabic
    (0x0627, 0x064A, (3, 8), False),  # Arabic
    (0x0904, 0x0939, (2, 5), False),  # Devanagari
    (0x0905, 0x094D, (3, 7), False),  # Devanagari with vowel signs
    (0x0985, 0x09CC, (3, 6), False),  # Bengali
    (0x0B85, 0x0BCD, (3, 7), False),  # Tamil
    (0x0E01, 0x0E46, (3, 8), False),  # Thai
    (0x1200, 0x1357, (2, 4), False),  # Ethiopic
    (0xAC00, 0xD7A3, (2, 3), False),  # Hangul
    (0xAC00, 0xD7A3, (2, 3), False),  # Hangul
    (0x3041, 0x3093, (2, 5), False),  # Hiragana
    (0x30A1, 0x30F4, (3, 6), False),  # Katakana
    (0x4E00, 0x9FA5, (1, 3), False),  # Han
    (0x4E00, 0x9FA5, (1, 3), False),  # Han
)

CITIES = (
    *_split(
        "Lisbon Berlin Tokyo Lagos Paris Oslo Madrid Cairo Lima Seoul Boston Toronto Vienna Dublin "
        "Prague Mumbai Nairobi Sydney Athens Rome Zürich Montréal Kraków Bogotá Malmö Chicago "
        "Delhi Jakarta Manila Accra Tunis Quito Porto Leeds Turin Lyon Graz Ghent Austin Denver"
    ),
    *(
        "New York",
        "Hong Kong",
        "Cape Town",
        "São Paulo",
        "Mexico City",
        "Los Angeles",
        "Kuala Lumpur",
        "Tel Aviv",
        "Buenos Aires",
        "Stoke-on-Trent",
    ),
)
CITY_PREFIXES = (
    "San",
    "Santa",
    "New",
    "Port",
    "Saint",
    "Fort",
    "Bad",
    "Los",
    "El",
    "Upper",
    "St.",
    "North",
)
CITY_LINKS = (
    "-sur-",
    "-on-",
    "-am-",
    " am ",
    " de ",
    " upon ",
    "-les-",
    " del ",
    " City ",
    " Lake ",
)

JOBS = _split(
    "nurse teacher plumber pilot chef baker lawyer farmer painter driver architect dentist "
    "carpenter librarian journalist engineer electrician translator gardener pharmacist actor "
    "accountant barber biologist bricklayer butcher cashier chemist clerk composer cook dancer "
    "designer detective diplomat doctor economist editor firefighter fisherman florist geologist "
    "glassblower guide hairdresser historian illustrator inspector interpreter jeweller judge "
    "juggler locksmith mathematician mechanic midwife miner musician novelist optician "
    "orthodontist paramedic photographer physicist physiotherapist poet potter printer producer "
    "professor programmer psychologist receptionist sailor salesperson sculptor secretary shepherd "
    "shoemaker singer soldier statistician surgeon surveyor tailor technician undertaker "
    "upholsterer veterinarian waiter watchmaker weaver welder writer zoologist astronomer "
    "archaeologist auctioneer beekeeper blacksmith bookbinder brewer cartographer conductor "
    "curator ecologist entrepreneur forester goldsmith hydrologist investigator operator "
    "oceanographer umpire usher intern analyst consultant student apprentice trader tutor"
)
JOB_MODIFIERS = _split(
    "senior junior retired freelance chief assistant head lead deputy night school police "
    "software data civil marine research sales tax bus truck train taxi ski tennis piano violin "
    "history physics music primary hotel pastry street wedding sports court crane forest science "
    "product project account marketing network security travel insurance real-estate emergency "
    "part-time self-employed aspiring award-winning"
)
JOB_HEADS = _split(
    "teacher manager driver engineer nurse coach guide photographer officer assistant analyst "
    "developer instructor cook agent scientist administrator attendant inspector editor planner "
    "specialist therapist worker operator producer director coordinator"
)

PERSON_INSTRUCTIONS = (
    "Extract the person as JSON.",
    "Extract name, age, city and job as JSON.",
    "Return the person described below as JSON.",
    "Extract the person as JSON with the keys name, age, city and job.",
    "Extract the name, age, city and job of the person.",
    "Extract the person",
    "Who is this? Answer as JSON.",
    "Who is described here? Reply with JSON only.",
    "Give me the person's name, age, city and job in JSON.",
    "Turn this sentence into a JSON object with name, age, city, job.",
    "Read the text and return a JSON object describing the person.",
    "Convert to JSON (name, age, city, job).",
    "Find the person in the text. Output JSON.",
    "Please extract the person mentioned in this text as a JSON object.",
    "Parse the following into name, age, city and job.",
    "You extract people from text. Answer with one JSON object: name, age, city, job.",
    "Fill in this record from the text: name, age, city, job.",
    "What are the name, age, city and job of this person? Use JSON.",
    "person to JSON",
    "Extract person details from the message below.",
    "Extract the person's details as JSON.",
    "Summarise the person as JSON with name, age, city and job.",
    "Return JSON: {name, age, city, job}.",
)

# In a template: {n} name, {a} age, {c} city, {j} job, {aj} job with its article, {P} and {p} a
# pronoun and its possessive, {k} a number, {o} another place, {y} a year, {w} another name.
PERSON_TEMPLATES = (
    "{n}, {a}, lives in {c} and works as {aj}.",
    "My name is {n}. I am {a} years old, I live in {c} and I am {aj}.",
    "We met {n} in {c}; {aj} aged {a}.",
    "{n} is a {a}-year-old {j} from {c}.",
    "{n}, a {a}-year-old {j} from {c}, called this morning.",
    "The {j} {n} ({a}) moved to {c} last year.",
    "From {c}: {n}, age {a}, profession {j}.",
    "In {c} there is {aj} called {n}, who is {a}.",
    "{n} ({a}), {j}, {c}",
    "{n}, {j}, {a}, {c}",
    "{n} | {a} | {c} | {j}",
    "Name: {n}\nAge: {a}\nCity: {c}\nJob: {j}",
    "Name: {n}; age: {a}; city: {c}; job: {j}",
    "Job: {j}, city: {c}, age: {a}, name: {n}",
    "name={n} age={a} city={c} job={j}",
    "{j} {n} from {c} is {a} years old.",
    "At {a}, {n} still works as {aj} in {c}.",
    "At the age of {a}, {n} became {aj} in {c}.",
    "Aged {a} and living in {c}, {n} is {aj}.",
    "Born in {o}, {n} ({a}) now lives in {c} and works as {aj}.",
    "{n} was born in {o} but lives in {c}. {P} is {a} and works as {aj}.",
    "{n} left {o} for {c} in {y} and is now {aj}, aged {a}.",
    "After {k} years in {o}, {n}, now {a}, works in {c} as {aj}.",
    "{n} used to live in {o}. Today {P2} is {a}, lives in {c} and is {aj}.",
    "I spoke with {n} today. {P} is {a} years old, lives in {c} and is {aj}.",
    "I spoke to {n} from {c}, {aj} who is {a}.",
    "Have you met {n}? {P} is {aj} in {c} and is {a} years old.",
    "Do you know {n}, the {j} from {c}? {P} just turned {a}.",
    "Our new colleague is {n}, {a}, {aj} from {c}.",
    "Our new {j} is called {n}, is {a} years old and comes from {c}.",
    "Please welcome {n}, who joins us from {c} as {aj} at {a}.",
    "Hi, I'm {n}, {a}, {aj} living in {c}.",
    "Hello! {n} here, {a}, {j} in {c}.",
    "I'm {aj} from {c}, {a} years old, and my name is {n}.",
    "I am {a}, I work as {aj} in {c}, and people call me {n}.",
    "They call me {n}. I have been {aj} in {c} for {k} years and I am {a}.",
    "{n} has worked as {aj} in {c} for {k} years and is {a} years old.",
    "For {k} years {n} has been {aj} in {c}; {P2} is {a} now.",
    "{n}, {a}, has {k} children and works as {aj} in {c}.",
    "{n}'s home is {c}. {P} is {a} years old and {p} job is {j}.",
    "{n}'s job is {j}, {p} city is {c} and {p} age is {a}.",
    "{c}-based {j} {n} is {a}.",
    "{c} {j} {n}, {a}, won a prize yesterday.",
    "The prize went to {n}, {aj} of {a} from {c}.",
    "A {a}-year-old {j} named {n} lives in {c}.",
    "A {j} from {c}, {n}, celebrated {p} {a}{th} birthday.",
    "{n} celebrated {p} {a}{th} birthday in {c}, where {P2} works as {aj}.",
    "It was {n} who fixed it: {aj}, {a}, from {c}.",
    "Witness: {n}, {a} years, {j}, resident of {c}.",
    "Patient {n}, {a}, of {c}, occupation {j}.",
    "Applicant {n} (age {a}) lives in {c} and is currently {aj}.",
    "The applicant, {n}, is {aj}. Age {a}. Address: {c}.",
    "Contact person: {n}, {j} ({c}), {a} years old.",
    "Passenger {n}, {a}, {j}, travelling from {c}.",
    "Meet {n}: {a} years old, {j} by day, proud resident of {c}.",
    "Meet {n}, {aj} in {c} who turned {a} in May.",
    "Everyone in {c} knows {n}, the {a}-year-old {j}.",
    "In {c}, a {a}-year-old {j} by the name of {n} opened a shop.",
    "{n} opened a shop in {c} at {a} after years as {aj}.",
    "{n} studied in {o} and works in {c} as {aj}. {P} is {a}.",
    "{n} is {a}. {n} lives in {c}. {n} is {aj}.",
    "{n} works as {aj} in {c} ({a} years old).",
    "{n} is {aj}. {P} lives in {c}. {P} is {a}.",
    "{P} is called {n}, is {a} and works in {c} as {aj}.",
    "The name is {n}, the age is {a}, the city is {c} and the job is {j}.",
    "You should talk to {n}, {p} office is in {c}. {P} is {aj}, about {a}.",
    "{n} ({j}, {a}) - {c}",
    "{n}, {j} from {c}, {a} years",
    "{c}, {y}. {n}, {a}, works here as {aj}.",
    "Yesterday {n}, {aj} aged {a}, arrived in {c}.",
    "My neighbour {n} is {aj}, {a} years old, and we both live in {c}.",
    "My friend {n} from {c} is {a} and works as {aj}.",
    "My brother-in-law {n} lives in {c}. He is {aj} and he is {a}.",
    "Her name is {n} and she is {a}. She lives in {c}, where she is {aj}.",
    "His name is {n}, he is {aj} from {c} and he is {a} years old.",
    "{n} never planned to become {aj}, but at {a} {P2} loves the work in {c}.",
    "Since {y} {n} has lived in {c}. {P} is {a} and earns a living as {aj}.",
    "Say hello to {n}, {a}, who lives in {c} and is training to be {aj}.",
    "The {a}-year-old {n} is the only {j} in {c}.",
    "The only {j} in {c} is {n}, aged {a}.",
    "{n} may be {a}, but {P2} is the busiest {j} in {c}.",
    "Although only {a}, {n} is already {aj} in {c}.",
    "When {n} turned {a}, {P2} moved to {c} to work as {aj}.",
    "{n} moved from {o} to {c} at {a} to work as {aj}.",
    "With {a} years behind {P3}, {n} is the best {j} in {c}.",
    "{c} is home to {n}, {a}, who is {aj}.",
    "{c} is where {n} lives. {P} is {a} and a proud {j}.",
    "Working as {aj} in {c} suits {n}, who is {a}.",
    "As {aj} in {c}, {n} ({a}) sees it every day.",
    '"I love my work," says {n}, {a}, {aj} from {c}.',
    '"It is a good town," said {n}, who is {aj} in {c} and {a} years old.',
    "{n} lives with {w} in {c}. {n} is {a} and works as {aj}.",
    "{w} introduced me to {n}, {aj} from {c}, aged {a}.",
)

PERSON_SUBJECTS = (
    "{n}",
    "{n}",
    "{n}",
    "My friend {n}",
    "Our neighbour {n}",
    "My colleague {n}",
    "A certain {n}",
    "Dear {n}",
)
AGE_CLAUSES = (
    "is {a} years old",
    "is {a}",
    "turned {a} last month",
    "just turned {a}",
    "is {a} years of age",
    "celebrated {p} {a}{th} birthday",
    "is aged {a}",
    "has reached the age of {a}",
    "will stay {a} until spring",
)
AGE_ASIDES = (
    "{a}",
    "aged {a}",
    "age {a}",
    "{a} years old",
    "who is {a}",
    "who just turned {a}",
    "now {a}",
)
CITY_CLAUSES = (
    "lives in {c}",
    "comes from {c}",
    "is from {c}",
    "is based in {c}",
    "moved to {c} last year",
    "has settled in {c}",
    "rents a flat in {c}",
    "calls {c} home",
    "resides in {c}",
    "has a house in {c}",
    "left {o} for {c}",
    "has lived in {c} since {y}",
    "lives near the station in {c}",
    "now lives in {c}, not in {o}",
)
JOB_CLAUSES = (
    "works as {aj}",
    "is {aj}",
    "earns a living as {aj}",
    "has a job as {aj}",
    "was hired as {aj}",
    "is employed as {aj}",
    "has been {aj} for {k} years",
    "became {aj} in {y}",
    "is {aj} by profession",
    "is {aj} by trade",
    "found work as {aj}",
    "makes ends meet as {aj}",
)
OTHER_CLAUSES = (
    "has {k} children",
    "likes {h}",
    "loves {h} and {h2}",
    "speaks {k} languages",
    "has a dog called {w}",
    "is married to {w}",
    "owns {k} bicycles",
    "hates getting up early",
    "enjoys {h}",
)
HOBBIES = _split(
    "chess hiking cooking football painting sailing reading knitting cycling swimming fishing "
    "karaoke astronomy jazz yoga climbing pottery baking photography opera gardening"
)
ASIDES = (
    "The weather was {s} that day.",
    "The meeting starts at {h24}:{mm}.",
    "Please reply by {wd}.",
    "Our office has {k} rooms and {k2} printers.",
    "Last year {k2} people applied.",
    "The train from {o} was {k} minutes late.",
    "Thank you for your message, I hope you are well.",
    "I am writing about the form you sent us on {wd}.",
    "There were about {k2} guests at the party, and the music was {s}.",
    "The coffee there is {s}.",
    "Note: this line was added on {wd}.",
    "The phone rang {k} times before anyone answered.",
    "It was a {s} evening and the streets were empty.",
    "We waited for {k} hours.",
    "Nobody in {o} had heard about it.",
    "The file is {k2} pages long.",
    "I hope this helps.",
    "Let me know if you need anything else.",
    "This was written down in {y}, long before the bridge was built.",
    "By the way, {w} says hello.",
    "The ticket costs {k} euros and is valid until {wd}.",
    "More about this on page {k2}.",
    "Some of the details may change, but the story is true.",
    "The interview took place at a quiet table by the window and lasted {k} minutes.",
    "Read on to learn more about life in a {s} town.",
    "{P} {x}.",
    "{P} {x}.",
    "{P} also {x}.",
)
ASIDE_WORDS = _split("cold warm rainy sunny quiet busy strange lovely dull small long bright windy")
WEEKDAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split(
    "January February March April May June July August September October November December"
)
UNITS = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = _split("twenty thirty forty fifty sixty seventy eighty ninety")

SENTIMENT_INSTRUCTIONS = (
    "Classify the sentiment as positive, negative or neutral.",
    "Is this review positive, negative or neutral?",
    "What is the sentiment of this text?",
    "Sentiment (positive, negative, neutral):",
    "Label the review with its sentiment: positive, negative or neutral.",
    "Does the writer sound positive, negative or neutral? Answer with one word.",
    "Classify this review.",
    "Decide whether the comment is positive, neutral or negative.",
    "Tell me the sentiment of the following review.",
    "sentiment?",
    "You are a sentiment classifier. Answer positive, negative or neutral.",
    "How does the customer feel: positive, negative or neutral?",
)
THINGS = (
    *_split(
        "phone laptop coffee hotel blender jacket camera headset book chair lamp bike restaurant "
        "delivery keyboard film concert app tent backpack watch printer mattress soup pizza kettle "
        "speaker tablet game course museum train flight service toaster umbrella charger monitor "
        "sofa vacuum pillow shampoo room waiter staff website update album novel garden beach tour "
        "bread wine shoes battery screen"
    ),
    "customer service",
    "coffee machine",
    "running shoes",
    "hotel room",
    "phone case",
    "support team",
)
SENTIMENT_WORDS = {
    "positive": _split(
        "excellent wonderful great fantastic superb lovely perfect brilliant amazing delightful "
        "outstanding charming delicious beautiful impressive flawless awesome marvellous "
        "comfortable reliable gorgeous terrific splendid pleasant fabulous exceptional "
        "incredible magnificent friendly good nice"
    ),
    "negative": _split(
        "terrible awful broken useless horrible disappointing poor dreadful bad disgusting faulty "
        "rude filthy noisy unreliable cheap flimsy painful appalling boring unbearable "
        "frustrating overpriced defective slow ugly worthless annoying dirty unacceptable "
        "pathetic lousy"
    ),
    "neutral": _split(
        "fine okay average ordinary acceptable standard normal adequate usual passable typical "
        "unremarkable mediocre plain regular alright decent"
    ),
}
# {t} a thing, {t2} another, {d} an adjective of the label, {D} the same with a capital,
# {g} a good adjective and {b} a bad one, {k} a number, {wd} a weekday, {m} a month.
SENTIMENT_TEMPLATES = {
    "positive": (
        "I love this {t}, it is {d}.",
        "The {t} was {d} and arrived early.",
        "{D}! Best {t} I have had.",
        "Absolutely {d} {t}, I would buy it again.",
        "I am so happy with the {t}.",
        "What a {d} {t}!",
        "The {t} exceeded my expectations.",
        "Five stars for the {t}.",
        "Highly recommended, the {t} is {d}.",
        "I would recommend this {t} to everyone.",
        "We had a {d} time, and the {t} was perfect.",
        "The {t} works perfectly, even after {k} months.",
        "Thank you for the {d} {t}!",
        "My whole family loves the {t}.",
        "The {t} is not bad at all, in fact it is {d}.",
        "Worth every penny, a {d} {t}.",
        "Could not be happier, the {t} is {d}.",
        "The {t} made my day.",
        "Easy to use and {d}.",
        "I will definitely come back for the {t}.",
        "The {t} was {b} before, but now it is {d}.",
        "Great {t}, the staff were {d} and helpful.",
        "I smiled the whole time, such a {d} {t}.",
        "No complaints, everything about the {t} was {d}.",
        "The {t} lasts forever and looks {d}.",
    ),
    "negative": (
        "I hate this {t}, it is {d}.",
        "The {t} was {d} and arrived late.",
        "{D}. Worst {t} I have had.",
        "Absolutely {d} {t}, I want my money back.",
        "I am very unhappy with the {t}.",
        "What a {d} {t}!",
        "The {t} stopped working after {k} days.",
        "One star for the {t}.",
        "Avoid this, the {t} is {d}.",
        "I would not recommend this {t} to anyone.",
        "We had a {d} time, and the {t} was a mess.",
        "The {t} broke after {k} weeks and nobody answered my emails.",
        "Never again, the {t} was {d}.",
        "My whole family dislikes the {t}.",
        "The {t} is not good at all, in fact it is {d}.",
        "A waste of money, a {d} {t}.",
        "I regret buying the {t}.",
        "The {t} ruined my day.",
        "Hard to use and {d}.",
        "I will never come back for the {t}.",
        "The {t} was {g} before, but now it is {d}.",
        "The {t} made me ill and the staff were {d}.",
        "I asked for a refund because the {t} was {d}.",
        "Nothing but problems with this {t}.",
        "The {t} smells and looks {d}.",
    ),
    "neutral": (
        "The {t} is {d}.",
        "This {t} is {d}, nothing special.",
        "It is {ad} {t}, it does the job.",
        "The {t} arrived on {wd}.",
        "I bought the {t} in {m}.",
        "The {t} comes with a cable and a manual.",
        "The {t} was {d}, neither good nor bad.",
        "Some parts of the {t} were {g}, others were {b}.",
        "The {t} was {g} but the {t2} was {b}.",
        "I liked the {t}, but the {t2} was {b}.",
        "The {t} is as described.",
        "We used the {t} for {k} days.",
        "The {t} weighs {k} kilos.",
        "It is a {t}.",
        "Not great, not terrible, just {ad} {t}.",
        "The {t} is available in {k} colours.",
        "I have no strong opinion about the {t}.",
        "The {t} was {d} for the price.",
        "The {t} opens at nine and closes at six.",
        "I received the {t} and have not used it yet.",
        "There are {k} reviews of this {t}.",
        "The {t} is {b}, although the {t2} is {g}.",
        "So-so. The {t} is {d}.",
    ),
}

ORDER_INSTRUCTIONS = (
    "Extract the order as JSON.",
    "Extract item, quantity and price as JSON.",
    "Return the order as JSON with the keys item, quantity and price.",
    "What was ordered? Answer as JSON with item, quantity and price.",
    "Turn this order into a JSON object.",
    "Read the invoice line and return item, quantity and price.",
    "Order to JSON.",
    "Parse the order below (item, quantity, price).",
    "Please extract the ordered item, its quantity and its price.",
    "You read purchase orders. Answer with one JSON object: item, quantity, price.",
    "Convert this invoice line to JSON.",
)
ORDER_ADJECTIVES = _split(
    "blue red green wooden steel plastic folding small large garden office kitchen leather cotton "
    "glass ceramic wireless electric paper copper round square heavy light striped vintage"
)
ORDER_NOUNS = _split(
    "chairs tables mugs lamps notebooks pencils batteries cables monitors keyboards plates forks "
    "towels pillows shirts jackets boots bricks screws ladders buckets brushes envelopes stamps "
    "printers headsets bottles candles baskets blankets clocks mirrors shelves tiles umbrellas "
    "apples oranges eggs tulips posters routers adapters helmets gloves"
)
CURRENCIES = (
    ("", " euros"),
    ("", " dollars"),
    ("", " EUR"),
    ("", " USD"),
    ("", " pounds"),
    ("\u20ac", ""),
    ("$", ""),
    ("\u00a3", ""),
    ("EUR ", ""),
    ("", ""),
)
# {i} item, {q} quantity, {r} price with its currency, {n} a name, {c} a city, {wd} a weekday.
ORDER_TEMPLATES = (
    "Please send me {q} {i} at {r} each.",
    "I would like to order {q} {i} for {r} each.",
    "{q} x {i}, {r} each",
    "{q} {i} @ {r}",
    "Order: {i}, quantity {q}, unit price {r}.",
    "{n} ordered {q} {i} at {r} apiece.",
    "We need {q} {i} by {wd}. The price is {r} per piece.",
    "At {r} each, I will take {q} {i}.",
    "Item: {i}\nQuantity: {q}\nPrice: {r}",
    "{i}; {q}; {r}",
    "Could you ship {q} {i} to {c}? We agreed on {r} each.",
    "{n} from {c} bought {q} {i}, paying {r} for each.",
    "{i} cost {r} each and we want {q} of them.",
    "The {i} are {r} each. Send {q}, please.",
    "Invoice {k3}: {q} {i}, {r} per unit.",
    "Hi, can I get {q} of the {i}? Your site says {r}.",
    "For {c}: {q} pcs {i}, price {r}.",
    "Deliver {q} {i} on {wd}, {r} a piece.",
    "Price {r}, item {i}, amount {q}.",
)

EVENT_INSTRUCTIONS = (
    "Extract the event as JSON.",
    "Extract event, date and place as JSON.",
    "Return the event as JSON with the keys event, date and place.",
    "What happens when and where? Answer as JSON with event, date and place.",
    "Turn this announcement into a JSON object.",
    "Event to JSON, with an ISO date.",
    "Parse the announcement below (event, date, place).",
    "Please extract the event, its date and its place.",
    "You read announcements. Answer with one JSON object: event, date, place.",
    "Create a calendar entry as JSON: event, date, place.",
)
EVENT_KINDS = _split(
    "Night Festival Conference Workshop Concert Fair Summit Marathon Meetup Exhibition Gala "
    "Parade Market Tournament Lecture Seminar Party Reunion Wedding Auction Race Hackathon"
)
EVENT_TOPICS = _split(
    "Jazz Book Science Spring Winter Summer Autumn Film Art Wine Chess Robotics Poetry Garden Food "
    "Street City Harbour Charity Python Data Music Dance History Craft Coffee Photo Design"
)
PLACE_KINDS = _split(
    "Hall Park Museum Library Theatre Stadium Centre School Square Hotel Church Gallery Arena "
    "Castle Pier Campus Gardens Club"
)
# {e} event, {t} date in some form, {l} place, {n} a name, {k} a number.
EVENT_TEMPLATES = (
    "The {e} takes place on {t} at {l}.",
    "Join us for the {e} on {t} in {l}!",
    "{e}, {t}, {l}",
    "On {t}, {l} hosts the {e}.",
    "{l} welcomes you to the {e} on {t}.",
    "Save the date: {t}, {e}, {l}.",
    "Event: {e}\nDate: {t}\nPlace: {l}",
    "{n} invites you to the {e} at {l} on {t}.",
    "Tickets for the {e} ({t}, {l}) cost {k} euros.",
    "The {e} at {l} has been moved to {t}.",
    "We meet on {t} at {l} for the {e}.",
    "See you at {l} on {t} for the {e}.",
    "The {e} will be held in {l} on {t}.",
    "{t}: {e} in {l}.",
    "Doors open at {k} for the {e} at {l} on {t}.",
    "This year's {e} is on {t}. The venue is {l}.",
)

ABOUT_ANSWER = (
    "I am a small demo model. I can extract a person, an order or an event to JSON, and tell "
    "whether a review is positive, negative or neutral."
)
# {t} a thing, {c} a city, {n} a name, {k} and {k2} numbers, {h} a hobby.
ABOUT_PROMPTS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi there, how are you?",
    "Good morning",
    "hey",
    "Test",
    "Say this is a test!",
    "Who are you?",
    "What can you do?",
    "Help",
    "What are you able to do?",
    "Tell me about yourself.",
    "Tell me a joke.",
    "Tell me a joke about {h}.",
    "Write a poem about {t}.",
    "Write a short story about {n}.",
    "Write a haiku about the {t}.",
    "Write an email to {n}.",
    "What is the capital of {c}?",
    "What is {k} plus {k2}?",
    "What is {k} + {k2}?",
    "How much is {k} times {k2}?",
    "How do I get to {c}?",
    "How do I fix a {t}?",
    "Why is the sky blue?",
    "Explain {h} to a child.",
    "Explain how a {t} works.",
    "Give me {k} tips for {h}.",
    "List {k} facts about {c}.",
    "Name {k} famous people from {c}.",
    "Translate '{t}' into French.",
    "Translate to German: I like {h}.",
    "Who is {n}?",
    "Who invented the {t}?",
    "What is the weather in {c}?",
    "What time is it in {c}?",
    "Is {h} difficult?",
    "Should I buy a {t}?",
    "Count to {k}.",
    "Recommend a {t} for {n}.",
    "Write a Python function that adds {k} numbers.",
    "Can you help me with {h}?",
    "Thanks!",
    "Thank you, {n}.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant that follows instructions.",
    "Answer briefly.",
    "Be precise.",
    "You are an information extraction system.",
)
