"""Huge pages for large blocks of memory, such as a model's weights."""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """
    Start this process again, with huge pages for its large blocks of memory, if it has none yet.

    Each token reads all weights of a model, and with pages of 4 KiB the CPU spends a part of that
    time on finding them. glibc decides when a program starts
    (https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html): so this
    replaces the program by itself, in the same process, and must come before slow imports. Does
    nothing if the environment has the setting, whatever its value; without glibc it has no effect.
    """
    tunables = os.environ.get(TUNABLES, "")
    if sys.platform != "linux" or SETTING in tunables:
        return
    os.environ[TUNABLES] = ":".join(filter(None, (tunables, f"{SETTING}=1")))
    os.execv(sys.executable, sys.orig_argv)
