"""`python -m data_prep`; see `cli`."""

import signal
import sys

from data_prep.system.ctrl_c import again_if_ignored, interrupt, it_was_answered, loading

if __name__ == "__main__":
    with loading():
        from data_prep.commands.parser import main
    sys.unraisablehook = again_if_ignored
    signal.signal(signal.SIGINT, interrupt)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said
    it_was_answered()
    sys.exit(code)
