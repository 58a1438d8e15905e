"""Huge pages for large blocks of memory, such as a model's weights."""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
ON = f"{SETTING}=1"
RESTARTED = "huge_pages"
"""The `-X` option of a program that has been restarted; Python itself ignores it."""


def use_huge_pages() -> None:
    """
    Execute this program again with glibc's setting for huge pages: once, and under the same process
    id. Does nothing if the environment has the setting already, whatever its value.

    A step reads all weights of a model, and with pages of 4 KiB a part of that time goes into
    misses of the TLB. glibc reads the setting when a program starts
    (https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html), so call
    this before slow imports. Other C libraries ignore it.
    """
    tunables = os.environ.get(TUNABLES, "")
    is_restarted = RESTARTED in sys._xoptions  # also where something removes the variable
    if sys.platform != "linux" or SETTING in tunables or is_restarted or not sys.executable:
        return
    os.environ[TUNABLES] = ":".join(filter(None, (tunables, ON)))
    program, *arguments = sys.orig_argv
    os.execv(sys.executable, [program, "-X", RESTARTED, *arguments])
