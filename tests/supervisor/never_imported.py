"""A module whose import does not end: what a hung fork server looks like."""

from __future__ import annotations

import threading

threading.Event().wait()
