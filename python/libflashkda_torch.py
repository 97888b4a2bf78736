# SPDX-License-Identifier: MIT
"""What torch calls at the end of its own import (entry point group "torch.backends"): libflashkda, where it is imported
already, registers its custom ops. Otherwise it will do so by itself when it is, and until then costs nothing."""

import sys


def register() -> None:
    if "libflashkda" in sys.modules:
        import libflashkda._torch  # noqa: F401
