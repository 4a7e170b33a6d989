# SPDX-License-Identifier: MIT
"""`python -m bench scale`: time and memory of context parallelism on paper, and the measured points beside it.

    machine.py   what a machine does in a second: published numbers, and our measured rates
    model.py     FLOPs, bytes and seconds of each part of a layer's attention on one rank
    room.py      bytes that a rank holds
    measure.py   the same on a machine of several processes: its constants, times and memory
    worker.py    what each of these processes runs
    report.py    the tables, and what they say in words
    command.py   the command

A GPU is only predicted. On a CPU several processes check the model.
"""
