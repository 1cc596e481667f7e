"""The parts of which sentences about facts are made; training and tests have parts of their own.

A statement is a lead, a clause, the value and a tail; a question an opening, a clause or a short cue, and the
value. A clause is a subject and a link. The value comes last in each of them: what precedes it names what it
belongs to, so that a causal model can connect both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Parts of sentences, with {name}, {relation} and, in openings, {subject}.

    relations: (words, kinds of values). subjects and links make clauses, verbs are whole clauses. A part that
    stands several times is drawn as often. nameless: subjects without a name. openings: what asks, before a
    clause. cues: what stands after an opening instead of a clause.
    """

    relations: tuple[tuple[str, tuple[str, ...]], ...]
    subjects: tuple[str, ...]
    links: tuple[str, ...]
    verbs: tuple[str, ...]
    nameless: tuple[str, ...]
    leads: tuple[str, ...]
    tails: tuple[str, ...]
    openings: tuple[str, ...]
    cues: tuple[str, ...]


def _of_kind(kinds: tuple[str, ...], *relations: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((relation, kinds) for relation in relations)


_NUMBER, _CODE = ("number",), ("number", "code", "made-up")
_WORD, _PERSON, _PLACE, _DATE = ("word", "made-up", "two words"), ("person",), ("place",), ("date",)

TRAINING = Parts(
    relations=(
        *_of_kind(_NUMBER, "account", "locker", "room", "telephone", "badge", "invoice", "ticket", "score"),
        *_of_kind(_NUMBER, "secret figure", "bus line", "policy", "licence", "extension", "weight in grams"),
        *_of_kind(_NUMBER, "population", "height in feet", "parcel", "order", "postal code", "meter reading"),
        *_of_kind(_CODE, "access code", "door code", "serial", "reference", "PIN", "registration", "voucher"),
        *_of_kind(_CODE, "combination", "flight", "booking reference", "token", "case file", "shelf mark"),
        *_of_kind(_WORD, "password", "code name", "nickname", "emblem", "motto", "favourite dish", "horse"),
        *_of_kind(_WORD, "secret", "signal", "sign", "answer", "ship", "dog", "cat", "instrument", "hobby"),
        *_of_kind(_WORD, "colour", "gift", "title", "project", "team", "flag", "tool", "weapon", "trade"),
        *_of_kind(_PERSON, "owner", "teacher", "brother", "doctor", "captain", "landlord", "best friend"),
        *_of_kind(_PERSON, "author", "founder", "neighbour", "manager", "guide", "rival", "heir"),
        *_of_kind(_PLACE, "home town", "birthplace", "destination", "capital", "street", "river", "school"),
        *_of_kind(_PLACE, "hiding place", "office", "village", "harbour", "last stop", "employer"),
        *_of_kind(_DATE, "birthday", "wedding day", "deadline", "date of departure", "founding date"),
        *_of_kind(_DATE, "appointment", "first voyage", "day of arrival", "expiry date"),
    ),
    subjects=(
        *3 * ("the {relation} of {name}",), *3 * ("{name}'s {relation}",),
        *2 * ("the {relation} for {name}",),
        "the {name} {relation}", "the {relation} that belongs to {name}", "the {relation} given to {name}",
        "the {relation} listed for {name}", "the {relation} on file for {name}", "{name}: the {relation}",
        "for {name}, the {relation}", "the {relation} {name} has", "the current {relation} of {name}",
        "[{name}] {relation}", "the {relation} chosen by {name}",
    ),
    links=(
        *6 * (" is ",), *2 * (" is: ",), *2 * (": ",), *2 * (" was ",), " = ", " -> ", " has been set to ",
        " reads ", " will be ", " is now ", " equals ", ", namely ", " has always been ",
    ),
    verbs=(
        "{name} has the {relation} ", "{name} goes by the {relation} ", "{name} was given the {relation} ",
        "{name} | {relation} | ", "for {name} they wrote down the {relation} ",
        "{name} keeps the {relation} ",
        "the entry for {name} under {relation} says ",
    ),
    nameless=("the {relation}", "our {relation}", "my {relation}", "the new {relation}"),
    leads=(
        *8 * ("",), "Note: ", "Remember this: ", "For the record, ", "By the way, ", "As agreed, ",
        "Listen: ",
        "Important: ", "It is written that ", "We were told that ", "In short, ", "Everybody knows that ",
        "- ", "They say that ", "Yesterday I learned that ",
    ),
    tails=(
        *8 * ("",), " Remember it.", " Do not forget it.", " Keep it safe.", " That is certain.",
        " Nobody else knows.", " Please write it down.",
    ),
    openings=(
        *3 * ("",), *4 * ("What is {subject}? ",), "Do you remember {subject}? ", "Tell me {subject}. ",
        "Can you recall {subject}? ", "Please give {subject}. ", "Question: what is {subject}?\n",
        "Q: What is {subject}?\n", "Now, what was {subject}? ", "Who knows {subject}? ",
    ),
    cues=("Answer: ", "A: ", "It is ", "The answer is ", "- ", "Yes: "),
)  # fmt: skip

# Among them are the words of titans.data.needles' tests.
TEST = Parts(
    relations=(
        *_of_kind(_NUMBER, "special magic number", "lucky number", "tracking number", "membership number"),
        *_of_kind(_CODE, "pass key", "product key", "unlock sequence"),
        *_of_kind(_WORD, "special magic word", "magic word", "username", "favourite animal"),
        *_of_kind(_PERSON, "successor", "lawyer"),
        *_of_kind(_PLACE, "meeting place", "holiday resort"),
        *_of_kind(_DATE, "anniversary", "release date"),
    ),
    subjects=(
        "one of the {relation}s for {name}", "the {relation} linked to {name}", "the {relation} {name} uses",
        "the {relation} registered under {name}",
    ),
    links=(" turned out to be ", " remains ", " comes to ", " is given as "),
    verbs=("{name} carries the {relation} ", "{name} answers to the {relation} "),
    nameless=("this text's {relation}", "their {relation}"),
    leads=("", "Take note, ", "Mind you, ", "According to the list, "),
    tails=("", " You will need it later.", " This matters."),
    openings=(
        "What did the text say about {subject}? ", "State {subject}. ", "I need {subject}. ",
        "Which is {subject}? ",
    ),
    cues=("Reply: ", "As stated, it is ", "That would be "),
)  # fmt: skip

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
FIRST_NAMES = (
    "Ada", "Adam", "Agnes", "Alan", "Alice", "Amina", "Amos", "Anita", "Anton", "Arthur", "Astrid",
    "Barbara", "Basil", "Beatrice", "Bella", "Boris", "Bruno", "Carla", "Carmen", "Cecil", "Chloe",
    "Clara", "Colin", "Conrad", "Cyril", "Daisy", "Dario", "David", "Diana", "Dmitri", "Dora", "Edgar",
    "Edith", "Elena", "Elias", "Elsa", "Emil", "Emma", "Enzo", "Erik", "Esther", "Ethan", "Eva", "Fabian",
    "Felix", "Fiona", "Flora", "Frank", "Freya", "Gemma", "George", "Gloria", "Grace", "Greta", "Gustav",
    "Hanna", "Harold", "Hazel", "Hector", "Helen", "Henry", "Hilda", "Hugo", "Ida", "Igor", "Ingrid",
    "Irene", "Iris", "Isaac", "Ivan", "Jacob", "James", "Jane", "Jonas", "Joseph", "Julia", "Karim",
    "Karl", "Kate", "Klara", "Kurt", "Laura", "Lena", "Leo", "Liam", "Lila", "Linda", "Louis", "Lucy",
    "Luis", "Lydia", "Magda", "Marco", "Maria", "Mark", "Martha", "Max", "Mia", "Mila", "Mona", "Nadia",
    "Nathan", "Nina", "Noah", "Nora", "Oleg", "Olga", "Oliver", "Omar", "Oscar", "Otto", "Paul", "Pedro",
    "Peter", "Philip", "Rachel", "Ralph", "Ramon", "Raul", "Rita", "Robert", "Rosa", "Ruben", "Ruth",
    "Samir", "Samuel", "Sandra", "Sara", "Simon", "Sofia", "Stella", "Sven", "Tara", "Theo", "Thomas",
    "Tina", "Tomas", "Ulla", "Ursula", "Vera", "Victor", "Vincent", "Viola", "Walter", "Wanda", "Wilma",
    "Xenia", "Yara", "Yusuf", "Zara", "Zoe",
)  # fmt: skip
