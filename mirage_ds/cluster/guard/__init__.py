"""A guard around each rank: heartbeats, one verdict for the whole job, an end instead of a hang.

    python -m mirage_ds.cluster.guard --port P mirage_ds.train …     around a rank, under any launcher
    python -m mirage_ds.cluster.guard.launch --master A --port P -- COMMAND…     around the launcher

Rank 0's guard holds the hub (hub.py): every other guard, and the one around the launcher, keeps a connection to it and
says twice a second that it lives, how its process is and where that is (heartbeat.py). The hub judges: a rank that
failed, is stopped or does not come on, a guard that fell silent, a launcher that is gone. Its verdict reaches every
guard, each ends its own processes, and all leave with one code. A guard that hears nothing from the hub does the same
by itself. No training code, no torch: about 20 MB a rank.
"""
