"""
Damage in a JPEG file that libjpeg passes over: it fills what it cannot read with grey or noise and only warns, and its
warnings do not reach Python.

ITU-T T.81, Annex B: the file is a row of segments; in the compressed data of a scan a byte FF is followed by 00, or is a
marker: of a restart, of the next segment, or of the end. What stays within these rules (other values of the same code
words) looks like any picture.
"""

import re

# In compressed data: a marker, that is FF (repeated as filling) and a byte that is neither 00 nor FF.
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SOI, _EOI, _SOS, _DRI = 0xD8, 0xD9, 0xDA, 0xDD
_RESTARTS = range(0xD0, 0xD8)
# What may follow a scan: tables (DHT, DAC, DQT, DNL, DRI), the next scan, APPn and comments.
_BETWEEN_SCANS = {0xC4, 0xCC, 0xDB, 0xDC, _DRI, _SOS, _EOI, 0xFE, *range(0xE0, 0xF0)}


def jpeg_damage(data: bytes) -> str | None:
    """
    What is wrong with the markers of a JPEG file, in words; `None` where nothing is. Bytes behind the end marker are
    not read: many cameras write some.

    Args:
        data: the whole file.
    """
    at, restarts = 2, False
    while True:
        marker = _MARKER.search(data, at)
        if marker is None:
            return "it ends before its end marker"
        code, at = marker[1][0], marker.end()
        if code == _EOI:
            return None
        if code in _RESTARTS or code in (0x01, _SOI):
            continue  # between segments these mean nothing
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            return "it ends within a segment"
        if code == _DRI:
            restarts = data[at + 2 : at + 4] != b"\0\0"
        at += length
        if code == _SOS:
            at, damage = _scan(data, at, restarts)
            if damage is not None:
                return damage


def _scan(data: bytes, at: int, restarts: bool) -> tuple[int, str | None]:
    """Where the compressed data that begin at `at` end, and what is wrong with them."""
    expected = 0
    for marker in _MARKER.finditer(data, at):
        code = marker[1][0]
        if code in _BETWEEN_SCANS:
            return marker.start(), None
        if code not in _RESTARTS:
            return marker.start(), f"a marker {code:02X} within compressed data, at byte {marker.start()}"
        if not restarts or code - _RESTARTS.start != expected:
            return marker.start(), f"a restart marker out of order, at byte {marker.start()}"
        expected = (expected + 1) % len(_RESTARTS)
    return len(data), "it ends before its end marker"
