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
HOBBIES = _split(
    "chess hiking cooking football painting sailing reading knitting cycling swimming fishing "
    "karaoke astronomy jazz yoga climbing pottery baking photography opera gardening"
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
