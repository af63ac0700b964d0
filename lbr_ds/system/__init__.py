"""Files, processes, locks and downloads: what the other rooms need from the machine.

Files and folders appear whole or not at all (`atomic.py`), one process at a time writes in a
folder (`locks.py`), child processes end with their parent (`children.py`), downloads are
complete or refused (`download.py`, `locate.py`), and every exception becomes one line with an exit
code (`failures.py`). Nothing here knows about models or recipes, and nothing imports torch.
"""
