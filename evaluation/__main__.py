"""The command line: python -m evaluation score|judge|blind|card ..."""

import os

import tyro

from evaluation.blind import Blind, Export, blind_export, blind_import
from evaluation.card import Card, write_cards
from evaluation.judge import Judge, judge
from evaluation.score import Score, check_args


def main(words: list[str] | None = None) -> None:
    """Run one command; words: the command line, by default that of the process."""
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    options = dict(prog="python -m evaluation", config=config, console_outputs=os.environ.get("RANK", "0") == "0")
    args = tyro.cli(Score | Judge | Blind | Card, args=words, **options)
    if isinstance(args, Score):
        check_args(args)
        from evaluation.sampling import score  # only `score` needs torch

        score(args)
    elif isinstance(args, Judge):
        judge(args)
    elif isinstance(args, Card):
        write_cards(args)
    elif isinstance(args.step, Export):
        blind_export(args.step)
    else:
        blind_import(args.step)


if __name__ == "__main__":
    main()
