# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Many wordings of a question, so that a tiny model learns to look for the concept and the aspects in it.

Trained on a few fixed phrasings, a model of a few million parameters learns those by heart and mistakes the concept in
any other. Here a question is put together at random from an opening, a cue for each aspect and a closing, thousands of
ways; the wordings are this file's own, and no test split is read.
"""

from __future__ import annotations

import random

from ..dental_qa.schema import Concept

CUES: dict[str, tuple[list[str], list[str]]] = {
    # aspect: (cues that name {x}, cues that follow a name; {n} is the neighbour, {its}/{it}/{is}/{does} agree with it)
    "definition": (
        ["what {x} {is}", "the nature of {x}", "the definition of {x}", "what {x} means", "{x} in simple words"],
        ["what {it} {is}", "{its} definition", "what that means", "a short description", "a definition"],
    ),
    "causes": (
        ["the causes of {x}", "why {x} happens", "what leads to {x}", "the reasons for {x}", "where {x} comes from"],
        ["the causes", "why {it} happens", "what leads to {it}", "{its} origin", "what is behind {it}"],
    ),
    "symptoms": (
        [
            "the signs of {x}",
            "the symptoms of {x}",
            "how {x} shows itself",
            "how to notice {x}",
            "what {x} feels like",
        ],
        ["the signs", "{its} symptoms", "how {it} shows itself", "how to notice {it}", "what one sees or feels"],
    ),
    "diagnosis": (
        ["the diagnosis of {x}", "how {x} {is} found", "tests for {x}", "how dentists check for {x}"],
        ["the diagnosis", "how {it} {is} found", "the tests for {it}", "how dentists check for {it}"],
    ),
    "treatment": (
        ["the treatment of {x}", "how {x} {is} treated", "what helps with {x}", "the care of {x}", "managing {x}"],
        [
            "the treatment",
            "how {it} {is} treated",
            "what helps",
            "how to manage {it}",
            "what a dentist does about {it}",
        ],
    ),
    "procedure": (
        ["the steps of {x}", "how {x} {is} carried out", "the procedure for {x}", "how {x} {is} done"],
        ["the steps", "how {it} {is} carried out", "the procedure", "how {it} {is} done"],
    ),
    "prevention": (
        ["how to prevent {x}", "the prevention of {x}", "how to avoid {x}", "protection from {x}"],
        ["the prevention", "how to prevent {it}", "how to avoid {it}", "what lowers the risk"],
    ),
    "complications": (
        ["the complications of {x}", "the risks of {x}", "what can go wrong with {x}", "problems after {x}"],
        ["the complications", "the risks", "what can go wrong", "possible problems"],
    ),
    "prognosis": (
        ["the outlook for {x}", "the prognosis of {x}", "how {x} usually turns out", "what to expect from {x}"],
        ["the outlook", "the prognosis", "how {it} usually turns out", "what to expect in the long run"],
    ),
    "aftercare": (
        ["the aftercare of {x}", "what to do after {x}", "looking after yourself following {x}", "recovery from {x}"],
        ["the aftercare", "what to do afterwards", "the care that follows", "what to mind afterwards"],
    ),
    "urgent_care": (
        [
            "when {x} {is} urgent",
            "when to get help quickly with {x}",
            "warning signs with {x}",
            "emergencies with {x}",
        ],
        ["when {it} {is} urgent", "when to get help quickly", "the warning signs", "when not to wait"],
    ),
    "comparison": (
        ["how {x} differs from {n}", "{x} compared with {n}", "the difference between {x} and {n}", "{x} versus {n}"],
        [
            "how {it} differs from {n}",
            "the difference from {n}",
            "a comparison with {n}",
            "how {it} compares with {n}",
        ],
    ),
    "uses": (
        ["the uses of {x}", "what {x} {is} used for", "when {x} {is} used", "where {x} helps"],
        ["the uses", "what {it} {is} used for", "when {it} {is} used", "where {it} helps"],
    ),
    "function": (
        ["the function of {x}", "what {x} {does}", "how {x} works", "the job of {x}"],
        ["the function", "what {it} {does}", "how {it} works", "the job {it} {does}"],
    ),
}
OPENINGS = (
    "Tell me about", "Please explain", "Explain", "Describe", "Describe briefly", "I want to understand",
    "Could you explain",
    "Can you tell me about", "I have a question about", "My question is about", "Write a few lines on", "Summarise",
    "Help me understand", "Say something about", "For my exam I need", "A patient asks about", "Teach me", "Outline",
    "In short:", "I am curious about", "What should I know about", "What do you know about", "Information on", "",
)  # fmt: skip
FRONTS = (
    "About {x}:", "Regarding {x},", "Concerning {x}:", "{x}:", "{x}.", "{x}?", "On {x}:", "My dentist mentioned {x}.",
    "I have heard of {x}.", "My note says {x}.", "I have to deal with {x}.", "Topic: {x}.",
    "A friend talked about {x}.",
    "The subject is {x}.", "As for {x},", "{x} came up today.",
)  # fmt: skip
ASKS = (
    "",
    "tell me",
    "please give",
    "I need",
    "what about",
    "explain",
    "I would like",
    "briefly",
    "please cover",
    "describe",
)
JOINTS = (" and ", ", and ", " as well as ", " and also ", ", then ", " plus ", ", together with ", "; ")
CLOSINGS = (
    ".",
    "?",
    ", please.",
    "",
    " Thank you.",
    ". Please be brief.",
    ", in plain words.",
    ". I am a student.",
    "!",
)
GREETINGS = (
    "",
    "",
    "",
    "",
    "Hello. ",
    "Hi, ",
    "Excuse me, ",
    "Quick question: ",
    "Doctor, ",
    "Good morning. ",
    "Sorry to ask. ",
)


def reworded(concept: Concept, name: str, aspects: list[str], neighbour: str, rng: random.Random) -> str:
    """
    A random question about `aspects` of `concept`.

    Args:
        name: how the concept is called here, with or without its article, or an alias.
        neighbour: the name of the concept it is compared with, "" where there is none.
    """
    words = {"x": name, "n": neighbour or "its neighbour"}
    agree = ("they", "their", "are", "do") if concept.plural else ("it", "its", "is", "does")
    words |= dict(zip(("it", "its", "is", "does"), agree, strict=True))
    if rng.random() < 0.5:
        first = rng.choice(CUES[aspects[0]][0])
        rest = [rng.choice(CUES[aspect][1]) for aspect in aspects[1:]]
        text = f"{rng.choice(OPENINGS)} {rng.choice(JOINTS).join([first, *rest])}"
    else:
        cues = [rng.choice(CUES[aspect][1]) for aspect in aspects]
        text = f"{rng.choice(FRONTS)} {rng.choice(ASKS)} {rng.choice(JOINTS).join(cues)}"
    text = " ".join((rng.choice(GREETINGS) + text.format(**words)).split()) + rng.choice(CLOSINGS)
    if rng.random() < 0.8:
        text = text[:1].upper() + text[1:]
    return text.replace(":,", ":").replace("..", ".").replace("?,", "?")


def reworded_rows(rows: list[dict], concepts: dict[str, Concept], each: int, seed: int) -> list[tuple[str, str]]:
    """
    `each` random questions for every distinct answer of the context-free `rows`, twice as many where it has several
    aspects; pairs of question and answer.
    """
    rng = random.Random(seed)
    made: list[tuple[str, str]] = []
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        key = (row["concept"], row["aspect"], row["answer"])
        aspects = row["aspect"].split("+")
        if row["context"] or key in seen or not all(aspect in CUES for aspect in aspects):
            continue
        seen.add(key)
        concept = concepts[row["concept"]]
        neighbour = concepts[concept.neighbour].name if concept.neighbour in concepts else ""
        names = [concept.name, concept.name, f"the {concept.name}", *concept.aliases[:1]]
        if not concept.plural:
            names.append(f"{'an' if concept.name[:1] in 'aeiou' else 'a'} {concept.name}")
        for _ in range(each * (2 if len(aspects) > 1 else 1)):
            made.append((reworded(concept, rng.choice(names), aspects, neighbour, rng), row["answer"]))
    return made
