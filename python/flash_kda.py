# SPDX-License-Identifier: MIT
"""libflashkda under FlashKDA's name, for programs that import flash_kda.

A module and no package: where FlashKDA is installed too, Python takes its folder flash_kda/ and not this file, whichever
came first, and neither distribution overwrites a file of the other.
"""

import libflashkda
from libflashkda import *  # noqa: F403


def __getattr__(name: str) -> object:
    return getattr(libflashkda, name)
