"""Fine-tune SDXL with LoRA on a small GPU: check, precompute, train, compare.

Each folder is a room, and its ``__init__.py`` says what is in it. On top of the rooms:

cli       the command line: a row for each stage, a flag for each setting
stages    each stage of a run, put together from the rooms; a new one begins with its room
checking  the stage check, apart: it loads less, and tells each line as soon as it is known
notebook  what notebooks call besides the stages: their config, a finished LoRA, figures
"""

import logging
import os

__version__ = "0.1.0"

# Both warn at import about optional extras that nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class UserError(Exception):
    """Something that the user can put right; the message says what to do next.

    The command line prints the message alone and exits with 2; notebooks show it without a traceback.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's hook for exceptions that draw themselves
        return [f"{type(self).__name__}: {self}"]
