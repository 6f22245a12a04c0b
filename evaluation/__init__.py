"""Evaluation of language models. `score` uses repo.py; the other commands need neither torch nor transformers.

python -m evaluation score --models sft=toy/policy repo=runs/repo-1/model     # models side by side
python -m evaluation judge --responses runs/suite --judge-model JUDGE         # another model compares their answers
python -m evaluation blind export --responses runs/suite --sheet sheet.csv    # people compare them
python -m evaluation card runs/repo-1                                         # a model card for the Hub
"""
