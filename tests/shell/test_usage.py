"""Refusals in flags: how a message of the library reads on the command line, and which options belong together."""

from __future__ import annotations

import argparse

import pytest

from hf_dataopt.shell.usage import UsageError, check_count, in_flags, only, refusing


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("keep_ratio must be in (0, 1], got 2", "--keep-ratio must be in (0, 1], got 2"),
        ("use on_error='skip' there", "use --on-error skip there"),
        ("set label_column=", "set --label-column"),
        ("score must be one of a, b", "--score must be one of a, b"),
        ("device 'abacus' cannot be used", "--device 'abacus' cannot be used"),
        ("the score of a row", "the score of a row"),
        ("score of a row", "score of a row"),
        ("the image_column is 'x'", "the --column is 'x'"),
        ("my_keep_ratio and keep_ratios", "my_keep_ratio and keep_ratios"),
        ("file.keep_ratio", "file.keep_ratio"),
    ],
)
def test_messages_name_flags(message: str, read: str) -> None:
    parser = argparse.ArgumentParser()
    for option in ("--keep-ratio", "--on-error", "--label-column", "--score", "--device", "--column"):
        parser.add_argument(option)
    parser.add_argument("dataset")
    assert in_flags(message, parser._actions, {"image_column": "--column"}) == read


def test_options_without_effect_are_refused() -> None:
    args = argparse.Namespace(batch_size=3, private=False, model=None, zero=0)
    only(args, False, "needs --push-to-hub", "private", "model")
    only(args, True, "needs --model", "batch_size")
    with pytest.raises(UsageError, match="^--batch-size needs --model$"):
        only(args, None, "needs --model", "batch_size", "private")
    with pytest.raises(UsageError, match="--batch-size, --zero"):
        only(args, None, "need --model", "batch_size", "zero")


def test_what_is_wrong_before_work_is_wrong_usage() -> None:
    for error in (ValueError("a"), TypeError("a"), UsageError("a")):
        with pytest.raises(UsageError, match="^a$"), refusing():
            raise error
    with pytest.raises(RuntimeError), refusing():
        raise RuntimeError
    check_count("rows", 1)
    with pytest.raises(UsageError, match="--max-rows must be at least 2, got 1"):
        check_count("max_rows", 1, 2)
