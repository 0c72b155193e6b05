"""A SentencePiece vocabulary of the training text, made with the library."""

import io
from collections.abc import Iterable
from pathlib import Path

import click
import sentencepiece

NAME = "tokenizer.model"  # beside the checkpoint, where the converter looks
PARAGRAPH = "\n\n"


def train(texts: Iterable[str], size: int, path: Path, characters: bool = False, seed: int = 0) -> None:
    """Learn `size` pieces (or take the characters as they are) and write them to `path`.

    Line ends are pieces of their own, spaces stay as they are, and unknown characters fall back to their bytes.
    Raises click.ClickException where the text has not so many pieces.
    """
    model = io.BytesIO()
    paragraphs = (part for text in texts for part in text.split(PARAGRAPH) if part.strip())
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=paragraphs,
            model_writer=model,
            model_type="char" if characters else "bpe",
            vocab_size=size,
            hard_vocab_limit=not characters,
            user_defined_symbols=[PARAGRAPH, "\n"],
            byte_fallback=not characters,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            character_coverage=0.9999,
            input_sentence_size=60_000,
            shuffle_input_sentence=True,
            max_sentence_length=20_000,
            num_threads=2,
            minloglevel=1,
        )
    except RuntimeError as e:
        reason = str(e).rpartition(") ")[2]
        raise click.ClickException(f"--vocab {size} does not fit the text: {reason}") from None
    path.write_bytes(model.getvalue())


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
