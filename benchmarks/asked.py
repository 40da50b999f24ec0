"""Prompts that answers are drafted for: questions, code, prose, a text to repeat, and what is hard to draft."""

import random

from teal_fast.families.args import ModelArgs
from teal_fast.files.tokenizer import Tokenizer

FUNCTION = """def read(path):
    file = open(path)
    lines = file.readlines()
    found = {}
    for line in lines:
        name, value = line.split("=")
        found[name] = value
    return found"""
MILL = (
    "The old mill stands by the lake. Every morning the miller opens the heavy doors, looks over the water and waits "
    "for the farmers, who bring their grain in wooden carts. When the wind is strong the wheel turns quickly, and the "
    "flour is ready by noon."
)
QUESTIONS = {
    "chat": (
        "Explain in three sentences why the sky is blue.",
        "Write a short story about a lighthouse keeper and a storm.",
        "Write a Python function that reverses the words of a sentence.",
        "What are the main causes of inflation?",
        "Give me a recipe for vegetable soup with five ingredients.",
        "Summarize the history of the Roman Empire in a paragraph.",
        "How do I write a polite email to ask for a day off?",
        "List ten animals that live in the ocean.",
        "Explain how a bicycle stays upright.",
        "What should I see in Paris in two days?",
    ),
    "code": (
        "Write a Python class for a queue with a maximum size, and tests for it with pytest.",
        "Write a C function that counts the words of a string, and explain it.",
        f"Rewrite this function so that the file is closed and empty lines are skipped:\n\n{FUNCTION}",
    ),
    "prose": (
        f"Tell in three paragraphs what a day at this mill is like:\n\n{MILL}",
        "Describe a market in a small town at dawn, as a novelist of the 19th century would.",
        "Write a letter from a sailor to his sister about his first week at sea.",
    ),
    "more": (
        "Write an SQL query that finds the three best customers of each month by revenue.",
        "Write a JSON file that describes five books by title, author, year and a list of subjects.",
        "Write an essay about why people keep diaries.",
        "Tell the story of a clockmaker who finds a clock that runs backwards.",
    ),
    "repeat": (f'Repeat this text word for word, but write "river" for "lake": {MILL}',),
    "hard": (
        "Write down a hundred random numbers from 1 to 10000, in no order.",
        "Make up fifty names of villages, a line each, none like another.",
        "Write a poem of nonsense in which no word stands twice.",
        "Say hello in as many languages as you know, with a word about each.",
    ),
}
RANDOM_IDS = 64  # of the prompt that "hard" begins with


def read_prompts(names: list[str], tokenizer: Tokenizer, args: ModelArgs) -> list[list[int]]:
    """The ids of all prompts of some sets, each as a chat's first message; "hard" begins with one of random ids."""
    found = []
    for name in names:
        if name == "hard":
            found.append(random.Random(0).choices(range(args.vocab_size), k=RANDOM_IDS))
        found += [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS[name]]
    return found
