"""Run a script with all models sharded over the processes, however small they are: sharded.py NAME FLAGS..."""

import importlib
import sys

script = importlib.import_module(sys.argv.pop(1))
script.is_small = lambda model: False
script.main(*script.start_processes())
script.shut_down()
