"""Registers the commands of `slow_commands` in processes that tests start.

Python imports this by itself at its start where this folder is on PYTHONPATH, so that detached
runs of real processes know the test-only commands.
"""

import slow_commands

slow_commands.register()
