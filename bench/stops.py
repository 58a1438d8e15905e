"""
Measure which ordinary answers CHAT_STOP cuts. A real chat model answers 50 prompts without stop
strings; then the default CHAT_STOP is applied to each answer, by its rules and literally.

    python -m bench.stops model/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf

Takes minutes for a 1.5B model on two cores. `--save` writes the answers for
tests/inference/engine/output/test_ordinary_answers.py.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from bench.report import RESULTS
from services.contract.messages import Sampling
from services.inference import models
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.parts import text_of
from services.inference.engine.output.stops import StopBuffer, StopRules
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.settings import STOPS, InferenceSettings

MAX_TOKENS = 160
SAMPLING = Sampling(temperature=0, repeat_penalty=1.1, max_tokens=MAX_TOKENS, stop=())
SAVED = Path("tests/inference/engine/output/ordinary_answers.json")
PROMPTS = (
    # examples
    "Give me an example of a for loop in C.",
    "Explain recursion with an example.",
    "What is a hash map? Give an example in Python.",
    "Show me an example of a JSON document that describes a person.",
    "What is the difference between a list and a tuple in Python? Give examples.",
    "Give an example of polymorphism in Java.",
    "What is an adverb? Give three examples.",
    "Show an example of a SQL join with two tables.",
    # code
    "Write a Python function that checks whether a number is prime.",
    "Write a Python module with two functions: one that reads a CSV file and one that writes it.",
    "How do I reverse a string in JavaScript?",
    "Write a bash script that counts the lines of all .txt files in a folder.",
    "Write an HTML page with a heading, a paragraph, and struck-through text.",
    "How do I add a user on Linux and give them sudo rights?",
    "Write a Dockerfile for a small Flask app.",
    "How do I use a list comprehension in Python?",
    "Write a unit test for a function add(a, b) with pytest.",
    "What does git rebase do?",
    # explanations
    "How does quicksort work?",
    "What is the difference between TCP and UDP?",
    "Explain how a bicycle stays upright.",
    "Why is the sky blue?",
    "What is overfitting in machine learning?",
    "Explain closures in JavaScript.",
    "What is a REST API?",
    "How does photosynthesis work?",
    # short answers
    "What is the capital of France?",
    "What is 17 times 23?",
    "Translate 'good morning' into Spanish, French and German.",
    "Who wrote Pride and Prejudice?",
    "Is 91 a prime number? Think step by step.",
    # quizzes, questions and answers, dialogues
    "Write a quiz question about the solar system with four choices and its answer.",
    "Make three flashcards about photosynthesis, each with 'Question:' and 'Answer:'.",
    "Quiz me on European capitals.",
    "Write a short FAQ for a pizza shop.",
    "Write a dialogue between a human and a robot about the weather.",
    "Write a chat between a user and a support agent about a lost password.",
    "Write five interview questions for a backend developer.",
    # letters and other texts
    "Write a short email to my landlord about a broken heater.",
    "Write an email to a colleague that asks for feedback on my draft.",
    "Write a cover letter for a job as a baker.",
    "Write a haiku about autumn.",
    "Tell me a short story about a fox.",
    "Write a product description of a wooden chair.",
    # lists, markdown, formats
    "List five tips for better sleep.",
    "Give me a recipe for pancakes.",
    "Compare cats and dogs in a markdown table.",
    "Write a README in markdown for a todo app, with a section on usage.",
    "Summarize the plot of Romeo and Juliet in three bullet points.",
    "Write the steps to make tea as a numbered list.",
)


class StoppedAnswer(NamedTuple):
    """The remaining text of an answer, and the stop string that ended it."""

    text: str
    stop: str | None


def main() -> None:
    options = _options()
    answers = generate_answers(options.model, options.threads)
    if options.save:
        SAVED.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    table = format_report(options.model.stem, answers)
    (RESULTS / "stops.md").write_text(table)
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure which ordinary answers CHAT_STOP cuts.")
    parser.add_argument("model", type=Path, help="the GGUF file of a chat model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help=f"write the answers to {SAVED}")
    return parser.parse_args()


def generate_answers(path: Path, threads: int) -> dict[str, str]:
    """Return the greedy answers by prompt, generated without stop strings."""
    settings = InferenceSettings(model_path=str(path), model_context=1024, model_threads=threads)
    model = models.load_chat_model(settings, lambda _: True)
    answers = dict.fromkeys(PROMPTS, "")
    finished: set[str] = set()

    def on_outputs(outputs: list[tuple[str, Output]]) -> None:
        for prompt, output in outputs:
            if isinstance(output, AnswerChunk):
                answers[prompt] += text_of(output.part)
            elif isinstance(output, Finished):
                finished.add(prompt)
                print(f"{len(finished)} of {len(PROMPTS)}: {prompt}", flush=True)

    def on_death() -> None:
        raise SystemExit("The engine died: see the error above.")

    engine = Engine(model.backend, settings.model_parallel, 0, on_outputs, on_death)
    for prompt in PROMPTS:
        system = settings.chat_system_prompt
        tokens = model.template.session_prompt(system, (), prompt, MAX_TOKENS).tokens
        sampler, answer = (
            model.backend.sampler(SAMPLING),
            GeneratedAnswer(AnswerLimits(MAX_TOKENS), StopRules()),
        )
        engine.submit(Sequence(prompt, tokens, SAMPLING, sampler, answer))
    while len(finished) < len(PROMPTS):
        engine.step()
    model.backend.close()
    return answers


def apply_stops(answer: str, stops: StopRules) -> StoppedAnswer:
    """Return the answer after the stops, applied a character at a time as in a stream."""
    buffer, text = StopBuffer(stops), ""
    for character in answer:
        out, stop = buffer.push(character)
        text += out
        if stop is not None:
            return StoppedAnswer(text, stop)
    return StoppedAnswer(text + buffer.flush(), None)


def format_report(model: str, answers: dict[str, str]) -> str:
    rows, whole, whole_literally = [], 0, 0
    for prompt, answer in answers.items():
        by_rules = apply_stops(answer, StopRules.from_setting(STOPS, prompt))
        literally = apply_stops(answer, StopRules.literal(STOPS))
        whole += by_rules.stop is None
        whole_literally += literally.stop is None
        cells = [_describe(stopped, answer) for stopped in (by_rules, literally)]
        rows.append(f"| {prompt} | {len(answer)} | {cells[0]} | {cells[1]} |")
    return "\n".join(
        [
            "# Ordinary answers and CHAT_STOP",
            "",
            f"{len(answers)} prompts, answered greedily by {model} in at most {MAX_TOKENS} tokens.",
            "The default CHAT_STOP is applied by its rules, and literally. A cell of a cut answer",
            "has the characters that are left and the stop string.",
            f"Whole: {whole} of {len(answers)} by the rules, {whole_literally} literally.",
            "",
            "| prompt | characters | CHAT_STOP | literally |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _describe(stopped: StoppedAnswer, answer: str) -> str:
    if stopped.stop is None and stopped.text == answer:
        return "whole"
    return f"{len(stopped.text)}, `{json.dumps(stopped.stop)}`"


if __name__ == "__main__":
    main()
