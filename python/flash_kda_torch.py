# SPDX-License-Identifier: MIT
"""What torch calls at the end of its own import (entry point group "torch.backends"): flash_kda, where it is imported
already, registers its custom ops. Otherwise it will do so by itself when it is, and until then costs nothing."""

import sys


def register() -> None:
    if "flash_kda" in sys.modules:
        import flash_kda._torch  # noqa: F401
