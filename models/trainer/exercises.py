"""Text that asks the memory for something: facts, lists and passages, told once and asked back pages later.

A fact is a sentence about somebody; its question comes as a paragraph, and the answer, a paragraph that repeats the
sentence, ends with the end-of-text piece, as a turn of a chat does. A passage of the book itself, or
words in no order, are repeated one for one. With a window of W tokens and a gap of several W only the memory can know
what was told.
"""

import random
from dataclasses import dataclass

PEOPLE = (
    "miller king queen fisherman baker tailor shepherd widow soldier sailor captain doctor teacher gardener painter "
    "piper hunter blacksmith carpenter cook farmer merchant beggar monk nurse judge clerk porter butler dancer "
    "singer writer potter weaver shoemaker innkeeper princess prince duke witch wizard giant dwarf goblin fairy "
    "wolf fox bear goose cat dog horse donkey raven owl frog mouse lion tiger rabbit goat rooster swan"
).split()
KINDS = (
    "old young blind tall little kind proud lazy clever poor rich quiet merry lame brave foolish gentle wicked "
    "strange lonely honest hungry sleepy silent"
).split()
NAMES = (
    "Tobias Anna Martin Clara Peter Rosa Henry Alice Oliver Emma George Mary Arthur Lucy Walter Jane Robert Ellen "
    "Thomas Ruth Edward Grace William Nora David Kate Simon Helen Frank Laura Philip Agnes Hugo Edith Paul Marion "
    "Jacob Amy Daniel Rachel Adam Sarah Felix Margaret Leo Dora Max Eva Oscar Ida Samuel Julia Victor Sophy Ralph "
    "Bessie Roger Fanny Albert Susan Harold Betty Charles Rose Richard Polly Stephen Molly Andrew Bella"
).split()
PLACES = (
    "London Paris Rome Spain France Scotland Ireland America Egypt India China Russia York Oxford Dover Boston "
    "the_mill the_forest the_castle the_village the_tower the_harbour the_garden the_cellar the_church the_stable "
    "the_mountains the_valley the_island the_city the_desert the_market the_palace the_cottage the_school the_north"
).split()
THINGS = (
    "key ring lamp rope knife clock sword book coat drum bell mirror candle basket letter stone crown cup flute map "
    "apple hat chain box needle feather pipe coin bottle spoon horn shell wheel ladder blanket glove kettle hammer "
    "ribbon penny boat stick watch purse barrel plate sack flower pistol shoe"
).split()
COLOURS = "red blue green white black yellow grey brown golden silver purple pink".split()

HELD_OUT = 5  # every fifth word of an answer's list is never asked for in training

# What is told, with its question; {who} is somebody, {what} the answer.
FACTS = (
    ("I know the {who} {what}.", "Who is the {who}?", NAMES),
    ("The {who} loves {what}.", "Whom does the {who} love?", NAMES),
    ("The {who}'s name is {what}.", "What is the {who}'s name?", NAMES),
    ("The {who} lives in {what}.", "Where does the {who} live?", PLACES),
    ("The {who} carries a {what}.", "What does the {who} carry?", THINGS),
    ("The {who}'s coat is {what}.", "What colour is the {who}'s coat?", COLOURS),
    ("The {who} is married to {what}.", "Who is married to the {who}?", NAMES),
    ("The {who} lost a {what}.", "What did the {who} lose?", THINGS),
)
TELL = "Remember this."
KEPT = "I will remember."
LIST = "The list is: {what}."
ASK_LIST = "What is on the list?"
AGAIN = "As it was told before:"
WORDS = "These words:"


@dataclass(frozen=True)
class Question:
    """A question, and its answer in two parts: what leads to it, and what only the memory can know."""

    ask: str
    lead: str
    answer: str


def words(choices: list[str], held_out: bool) -> list[str]:
    return [w.replace("_", " ") for i, w in enumerate(choices) if (i % HELD_OUT == 0) is held_out]


HELD = frozenset(word for choices in (NAMES, PLACES, THINGS, COLOURS) for word in words(choices, held_out=True))


def facts(rng: random.Random, count: int, held_out: bool = False) -> tuple[str, list[Question]]:
    """A paragraph that tells `count` facts about as many different people, and a question for each."""
    people = rng.sample([f"{kind} {person}" for kind in KINDS for person in PEOPLE], count)
    told, asked = [], []
    for who in people:
        sentence, question, choices = rng.choice(FACTS)
        answer = rng.choice(words(choices, held_out))
        lead, rest = sentence.format(who=who, what="\0").split("\0")
        told.append(lead + answer + rest)
        asked.append(Question(question.format(who=who), lead.rstrip(), f" {answer}{rest}"))
    return " ".join([TELL, *told]), asked


def shopping(rng: random.Random, count: int, held_out: bool = False) -> tuple[str, list[Question]]:
    """A paragraph with a list of `count` things in some order, and the question for it."""
    items = ", ".join(f"a {thing}" for thing in rng.sample(words(THINGS, held_out), count))
    lead, rest = LIST.format(what="\0").split("\0")
    return f"{TELL} {lead}{items}{rest}", [Question(ASK_LIST, lead.rstrip(), f" {items}{rest}")]
