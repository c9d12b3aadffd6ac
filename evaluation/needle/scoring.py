"""How an answer is judged."""

from evaluation.needle.wording import NUMBER_DIGITS

# What a model that writes random numbers of the right form would reach.
RANDOM_FOUND = 1 / (9 * 10 ** (NUMBER_DIGITS - 1))
RANDOM_LEADING_DIGITS = sum(1 / (9 * 10**known) for known in range(NUMBER_DIGITS))


def is_found(answer: str, number: str) -> bool:
    """Whether the number appears in an answer."""
    return number in answer


def leading_digits(answer: str, number: str) -> int:
    """How many digits are right, from the first one on, where an answer first has digits."""
    start = next((place for place, letter in enumerate(answer) if letter.isdigit()), len(answer))
    count = 0
    while count < len(number) and answer[start + count : start + count + 1] == number[count]:
        count += 1
    return count
