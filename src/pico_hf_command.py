"""Where the `pico-hf` command begins.

It stands outside the package, whose import registers the model and so loads torch: with this module
loaded, pico_hf leaves that to the command that needs it. Help and usage errors then cost no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and leaves with its exit code: 0, 1 (failed), 2 (usage) or 130 (^C).

    Args:
        arguments: Of the command line; None takes the process's own.
    """
    try:
        from pico_hf.cli.main import run
    except KeyboardInterrupt:  # modules are still being loaded
        sys.exit(130)
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


if __name__ == "__main__":
    sys.modules["pico_hf_command"] = sys.modules["__main__"]
    main()
