"""One file for each verb of `cpc-fast`; cli.py lists them.

A command reads its options, refuses what cannot work, calls the package and says what to do next. At the top of these
files stand only imports that are quick; numpy, torch and all that computes is imported inside the command, after what
can be refused without it.
"""
