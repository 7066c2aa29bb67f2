"""`mirage-ds doctor`: can these hosts run the job? It is asked before the job starts, and answered in seconds.

    command → examine → transport → probe (on each host)               what is there
                      → bandwidth → transport → bandwidth (a rank)     whether ranks meet, how fast the hosts talk
            → checks (Seen → findings) → command

`probe.py` is sent to the hosts as text and needs nothing there but the interpreter: a host without this package, or
with another version of it, can say so. The ranks start as the trainer's do: under a guard, with engine.setup.join.
"""
