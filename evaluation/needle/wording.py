"""The words of the needle and of the questions.

The needle and the two ways to ask follow the paper's experiments; the words around the text are our own.
"""

from dataclasses import dataclass

NUMBER_DIGITS = 7
NEEDLE = "\nThe special magic {city} number is: {number}.\n"


@dataclass(frozen=True)
class PromptKind:
    """What stands before and after the text; `after` is formatted with the city."""

    before: str
    after: str


PROMPT_KINDS = {
    # Asked as one would ask a chat model.
    "gemini": PromptKind(
        "Somewhere in the following text, the special magic number of a city is told. Read the text and remember the "
        "number, because you will be asked for it.\n\n<text>\n",
        "\n</text>\n\nQuestion: What is the special magic {city} number that the text tells?\n"
        "Answer: The number in the text is",
    ),
    # The needle's own beginning once more: induction is enough.
    "verbatim": PromptKind("", "\nThe special magic {city} number is:"),
}

_CITY_NAMES = (
    "Accra Adelaide Ankara Antwerp Athens Auckland Baku Bangkok Barcelona Belgrade Bergen Bogota "
    "Bologna Bratislava Brisbane Bucharest Cairo Calgary Cardiff Casablanca Chicago Copenhagen Dakar "
    "Denver Dublin Durban Edinburgh Florence Geneva Glasgow Hamburg Hanoi Helsinki Houston Istanbul "
    "Jakarta Kampala Krakow Kyoto Lagos Leipzig Lima Lisbon London Lyon Madrid Manila Marseille "
    "Melbourne Milan Montreal Mumbai Nairobi Naples Oslo Ottawa Paris Perth Prague Quito Riga Rome "
    "Santiago Seoul Seville Sofia Stockholm Tallinn Tokyo Toronto Tunis Utrecht Valencia Vienna Vilnius "
    "Warsaw Wellington Zagreb Zurich"
)
CITIES = tuple(_CITY_NAMES.split())
