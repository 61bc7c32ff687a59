"""Text files that people write: prompts and settings. What is wrong with one is said with its name and the line."""

from __future__ import annotations

from pathlib import Path

_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: Path, field: str, accepted: str) -> str:
    """The text of the UTF-8 file that `field` names, without a byte order mark, its lines ending in "\\n".

    Raises ValueError naming `field` and the file, and the line where the encoding is wrong.
    """
    if path.is_dir():
        raise ValueError(f"{field} is {str(path)!r}, a folder; accepted: {accepted}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{field} is {str(path)!r}, where there is no file; accepted: {accepted}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ValueError(f"{field} is {str(path)!r}, which cannot be read: {error}") from error
    if encoding := _BYTE_ORDER_MARKS.get(raw[:2]):
        raise ValueError(f"{field} is {str(path)!r}, which is {encoding}; accepted: UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x} in line {line}"
        raise ValueError(f"{field} is {str(path)!r}, which is not UTF-8 ({byte}); accepted: UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{field} is {str(path)!r}, which has a NUL byte in line {line}; accepted: UTF-8 text")
    return text.replace("\r\n", "\n")
