"""The command line: ``pyro-seq demo``, or ``python -m pyro_seq demo``."""
