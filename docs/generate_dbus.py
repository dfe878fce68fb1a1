"""Writes docs/dbus.md from config/org.caamhotplug1.xml: python3 docs/generate_dbus.py"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path()
CONTRACT = ROOT / "config" / "org.caamhotplug1.xml"
_EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"
_SIGNALLED = {"const": "never changes", "false": "not signalled"}
