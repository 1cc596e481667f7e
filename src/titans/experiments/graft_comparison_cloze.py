"""Twenty sentences about a real text, to be completed after reading it."""

from __future__ import annotations

import re

from titans.data import load_corpus

# The State of the Union of 2002: 4,700 tokens of SmolLM2, so that full attention can read all of it.
ADDRESS = "state-of-the-union/2002_george_w_bush_r"
# In the order of the text, all of them more than 512 tokens before its end. What completes a sentence, or
# begins what does, follows; several ways to write it are divided by "/". Written once, before any system was
# asked, and none was left out.
SENTENCES = (
    ("The interim leader of a liberated Afghanistan is Chairman", "Karzai/Hamid Karzai"),
    ("The new Minister of Women's Affairs of Afghanistan is Dr.", "Sima Samar/Samar"),
    ("Even across oceans, on mountaintops and in caves, our enemies will not escape justice at a distance of",
     "7,000 miles"),
    ("A retired firefighter returns to Ground Zero every day to feel closer to his two", "sons"),
    ("At a memorial in New York, a little boy left a note for his father with his", "football"),
    ("Micheal Spann, a CIA officer and marine, died in", "Mazar-e-Sharif/Mazar"),
    ("At the grave of her husband, Shannon Spann said the words", "Semper Fi"),
    ("The number of men who hijacked planes, most of them trained in Afghanistan's camps, was",
     "19/nineteen"),
    ("Terrorist training camps still exist in a number of countries, which is at least", "a dozen/twelve/12"),
    ("The country whose armed forces our troops are helping to train is the", "Philippines"),
    ("The government whose country's terrorists plotted to bomb our Embassy and were seized is that of",
     "Bosnia/the Bosnian"),
    ("Our Navy is patrolling the coast of", "Africa"),
    ("The Iraqi regime has plotted for over a decade to develop nerve gas, nuclear weapons and", "anthrax"),
    ("We have spent more than a billion dollars a month on the war, which is a day over", "30 million"),
    ("An airline flight attendant spotted a passenger who was lighting a", "match"),
    ("The two flight attendants whom we welcome are Hermis Moutardier and", "Christina Jones"),
    ("My friend Ted Kennedy was praised, which could not be believed by the folks at the coffee shop of",
     "Crawford"),
    ("On education reform I worked with Congressman George Miller, and with Senator Judd", "Gregg"),
    ("The service to neighbors and Nation that I ask of every American takes 2 years, or in hours at least",
     "4,000"),
    ("The number of new volunteers for AmeriCorps and Senior Corps is to be more than", "200,000"),
)  # fmt: skip


def address() -> str:
    """The text that the sentences are about."""
    return load_corpus(ADDRESS)[0].data.decode()


def prompt(sentence: str) -> str:
    """The sentence as a line of its own, without the space at its end, which belongs to the next token."""
    return f"\n\n{sentence}"


def first_line(text: str) -> str:
    """The first line of a generated answer that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def contains(text: str, answers: str) -> bool:
    """Whether one of the answers, divided by "/", stands in the text as whole words."""
    return any(_words(answer) in _words(text) for answer in answers.split("/"))


def _words(text: str) -> str:
    """The words in lower case, a space around each."""
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "
