from jobs.checks import Models, Problems
from tests.builders import describe


def models(problems: Problems) -> Models:
    return Models(describe, problems, override="simulated", max_models=16)


def test_every_line_of_a_second_model_is_counted_and_the_first_are_listed() -> None:
    problems = Problems(2)
    named = models(problems)
    for line in range(1, 11):
        named.add("x" if line % 2 else "y", line)
    named.finish()
    assert (problems.count, [one.line for one in problems.first()]) == (5, [2, 4])


def test_many_models_beside_the_chosen_one_are_counted_together() -> None:
    problems = Problems(3)
    named = models(problems)
    for line in range(1, 101):
        named.add(f"model-{line}" if line != 50 else "simulated", line)
    named.finish()
    assert (problems.count, [one.line for one in problems.first()]) == (99, [1, 2, 3])


def test_one_foreign_model_throughout_is_no_fault() -> None:
    problems = Problems(2)
    named = models(problems)
    for line in range(5):
        named.add("another-system", line)
    named.finish()
    assert problems.count == 0
