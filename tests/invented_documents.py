"""Documents about invented products, facts that no model knows, and questions about them in five ways.

    python tests/invented_documents.py FOLDER --documents 20

Writes `documents/*.txt`, `questions.jsonl` (kind, prompt or question, answer, document) and `pairs.jsonl` (question, answer): the same
questions in words in which they are not asked in questions.jsonl.
"""

import argparse
import json
import random
from pathlib import Path

KINDS = ("own beginning", "one sentence", "paraphrase", "question", "chat")
SYLLABLES = [
    "ba",
    "bel",
    "bri",
    "cor",
    "da",
    "dor",
    "el",
    "fan",
    "fi",
    "gal",
    "gro",
    "hal",
    "il",
    "jor",
    "ka",
    "kel",
    "lu",
    "mar",
    "mi",
    "nor",
    "o",
    "pra",
    "quin",
    "ra",
    "ri",
    "sel",
    "ta",
    "tor",
    "u",
    "vel",
    "vi",
    "zan",
]
THINGS = "water pump,desk lamp,bicycle bell,coffee grinder,garden shear,wall clock,tool chest,rain gauge,hand drill,bread oven"
MATERIALS = "brushed zinc,red cedar,grey slate,blown glass,black rubber,white marble,woven hemp,cast bronze,pressed cork,green jade"
TOWNS = "Tarnow,Viborg,Olten,Kotka,Bergamo,Lugo,Evora,Zwolle,Trogir,Dundalk,Narva,Sibiu,Gorizia,Kaunas,Bayeux"
FIRST = "Edda,Milo,Ines,Tomas,Greta,Anselm,Vera,Otto,Lidia,Ruben,Nadia,Jonas,Selma,Pavel,Irma"
# Value, then: the document's sentence up to the value and after it, a paraphrase, a question, a question of pairs.jsonl.
FACTS = (
    ("maker", "The {name} is a {thing} made by", " in small series.", "The company that builds the {name} is", "Who makes the {name}?", "Which firm is behind the {name}?"),
    ("material", "The housing of the {name} consists of", ", which keeps it quiet.", "The material around the {name} is", "What is the housing of the {name} made of?", "Which material was chosen for the case of the {name}?"),
    ("town", "Every {name} is put together by hand in", " before it is packed.", "The workshop that assembles the {name} is in", "In which town is the {name} assembled?", "Where do people build the {name}?"),
    ("designer", "The shape of the {name} was drawn by", ", who won a prize for it.", "The designer of the {name} is", "Who designed the {name}?", "Whose drawing gave the {name} its form?"),
    ("weight", "On the scales the {name} shows exactly", " grams without its box.", "The weight of the {name} in grams is", "How many grams does the {name} weigh?", "What does a {name} weigh, in grams?"),
    ("days", "One charge of the {name} lasts for", " days of daily use.", "The number of days for which the {name} runs on a charge is", "For how many days does a charge of the {name} last?", "How long, in days, can the {name} go without charging?"),
)  # fmt: skip


def word(chance: random.Random, syllables: int) -> str:
    return "".join(chance.choice(SYLLABLES) for _ in range(syllables)).capitalize()


def invent(count: int, seed: int = 0) -> tuple[list[str], list[dict[str, str]], list[dict[str, str]]]:
    """(documents, questions, pairs) of `count` products."""
    chance, documents, questions, pairs = random.Random(seed), [], [], []
    for number in range(count):
        name = f"{word(chance, 3)} {10 * number + chance.randrange(100, 110)}"
        values = {
            "maker": f"{word(chance, 2)} & {word(chance, 2)}",
            "material": chance.choice(MATERIALS.split(",")),
            "town": chance.choice(TOWNS.split(",")),
            "designer": f"{chance.choice(FIRST.split(','))} {word(chance, 2)}",
            "weight": str(chance.randrange(120, 980)),
            "days": str(chance.randrange(12, 98)),
        }
        thing, text = chance.choice(THINGS.split(",")), f"{name}\n\n"
        facts = list(FACTS)
        chance.shuffle(facts)
        for place, (key, sentence, after, paraphrase, question, other) in enumerate(facts):
            value = values[key]
            sentence, paraphrase, question, other = (
                each.format(name=name, thing=thing) for each in (sentence, paraphrase, question, other)
            )
            asked = {"own beginning": text + sentence, "one sentence": sentence, "paraphrase": paraphrase}
            about = {"answer": value, "document": name}
            questions += [{"kind": kind, "prompt": prompt, **about} for kind, prompt in asked.items()]
            questions += [{"kind": kind, "question": question, **about} for kind in KINDS[3:]]
            pairs.append({"question": other, "answer": value})
            text += f"{sentence} {value}{after}" + ("\n\n" if place == 2 else " ")
        documents.append(text.rstrip() + "\n")
    return documents, questions, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    documents, questions, pairs = invent(arguments.documents, arguments.seed)
    (arguments.folder / "documents").mkdir(parents=True, exist_ok=True)
    for text in documents:
        (arguments.folder / "documents" / f"{text.split(chr(10))[0].replace(' ', '-')}.txt").write_text(text)
    for name, rows in (("questions", questions), ("pairs", pairs)):
        (arguments.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
