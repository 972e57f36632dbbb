# Copyright 2026 The RETRO for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Reads the text of a file that is one document: a text file in any encoding, or a document such as PDF"""

import re
from dataclasses import dataclass

import pyarrow as pa
from charset_normalizer import from_bytes

from data_prep.extraction import FORMATS, Unreadable, extract_text
from data_prep.file_types import open_file, suffix_of


_KINDS_THAT_ARE_NO_TEXT = {
    "an image; not read": "png jpg jpeg gif bmp tif tiff webp ico svg heic avif psd",
    "sound or video; not read": "mp3 wav flac ogg m4a mp4 mkv avi mov webm",
    "an archive; unpack it first": "zip tar tgz 7z rar bz2 xz jar whl iso",
    "an old or locked Office file; save it as .docx, .xlsx or .pptx": "doc xls ppt",
    "XML of no known kind, whose tags are no text; not read": "xml xsd xsl",
    "a program; not read": "exe dll so o a dylib pyc pyd class wasm",
    "a font; not read": "ttf otf woff woff2 eot",
    "a database; export it as .csv or .jsonl": "db sqlite sqlite3 mdb",
    "numbers; not read": "npy npz pt pth safetensors gguf onnx pkl pickle h5 bin dat",
}
NO_TEXT = {f".{suffix}": reason for reason, names in _KINDS_THAT_ARE_NO_TEXT.items() for suffix in names.split()}

_SAMPLE = 1 << 20  # bytes that are looked at to find the encoding
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",  # before utf-16, whose mark is a part of it
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# The encodings that are guessed: of Windows, and of East Asia.
_LIKELY_ENCODINGS = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r"]
_LIKELY_ENCODINGS += ["cp932", "euc_jp", "gb18030", "big5", "cp949", "euc_kr"]
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # not those of text, nor the escape of colors
_CHARSET = re.compile(rb"""<meta[^>]{1,200}charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_HTML = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype html|html)\b", re.IGNORECASE)
_HEADING = re.compile(r"\s*#\s+(\S.*)")


@dataclass(frozen=True)
class ReadText:
    """The text of a file, its title if it says one, and its encoding if that is not UTF-8."""

    text: str
    title: str | None = None
    encoding: str | None = None


def read_text_file(file: str, max_bytes: int, encoding: str | None = None) -> ReadText:
    """
    Reads the text of a file that is one document.

    Args:
        file (`str`): The file.
        max_bytes (`int`): The largest size of the file, and of its text.
        encoding (`str`, *optional*): Encoding of text that is not UTF-8. By default it is guessed from the bytes.

    Raises:
        Unreadable: If the file holds no text. The message says why.
    """
    suffix = suffix_of(file)
    if suffix in NO_TEXT:
        raise Unreadable(NO_TEXT[suffix])
    try:
        with open_file(file) as handle:
            content = handle.read(max_bytes + 1)
    except (OSError, pa.ArrowException) as error:
        raise Unreadable(f"cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise Unreadable(f"a document over the limit of {max_bytes} bytes (--max-document-bytes)")
    if not content.strip():
        raise Unreadable("empty")
    if suffix not in FORMATS:
        suffix = ".pdf" if content.startswith(b"%PDF-") else ".html" if _HTML.match(content) else suffix
    if suffix not in FORMATS:
        text, found = decode(content, encoding)
        heading = _HEADING.match(text) if suffix in (".md", ".markdown") else None
        return ReadText(text, heading and heading[1].strip(), found)
    found = None
    if FORMATS[suffix] == "text/html":
        declared = _CHARSET.search(content[:2048])
        text, found = decode(content, encoding or (declared and declared[1].decode("ascii", "replace")))
        content = text.encode()
    try:
        return ReadText(*extract_text(content, FORMATS[suffix], max_bytes), found)
    except ImportError as error:
        raise Unreadable(f"{suffix} is not read: {error}") from error


def decode(content: bytes, encoding: str | None = None) -> tuple[str, str | None]:
    """
    Turns the bytes of a text into characters: by their byte order mark, as UTF-8, in a given encoding, or in the
    one that charset-normalizer finds likely.

    Args:
        content (`bytes`): The text.
        encoding (`str`, *optional*): Its encoding, if it is not UTF-8.

    Returns:
        `tuple[str, str | None]`: the text, and its encoding if that is not UTF-8.

    Raises:
        Unreadable: If these are no characters.
    """
    used = encoding_of(content, encoding)
    try:
        return content.decode(used), None if used in ("utf-8", "utf-8-sig") else used
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"not valid {used} at byte {error.start}; --encoding names the encoding of text that is not UTF-8"
        ) from error


def encoding_of(content: bytes, encoding: str | None = None) -> str:
    """The encoding of a text, as [`decode`] finds it."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return name
    sample = content[:_SAMPLE]
    if b"\0" in sample:
        # Text of mostly Latin letters in UTF-16 has zeros in every other byte, and nowhere else.
        even, odd = sample[::2].count(0), sample[1::2].count(0)
        if min(even, odd) == 0 and max(even, odd) > len(sample) // 8:
            return "utf-16-le" if odd else "utf-16-be"
        raise Unreadable("binary data, no text")
    if len(_CONTROLS.findall(sample)) > len(sample) // 50:
        raise Unreadable("binary data, no text")
    try:
        content.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError as error:
        position = error.start
    if encoding is not None:
        try:
            "".encode(encoding)
        except LookupError:
            raise Unreadable(f"not valid UTF-8 at byte {position}, and {encoding!r} is no known encoding") from None
        return encoding
    likely = list(from_bytes(sample, cp_isolation=_LIKELY_ENCODINGS))
    if not likely:
        raise Unreadable(f"not valid UTF-8 at byte {position}, and no other encoding is likely; --encoding names it")
    # Short texts allow many encodings. Among those that are as likely, that of Western Windows is the most common.
    first = likely[0].chaos, likely[0].coherence
    alike = [match for match in likely if (match.chaos, match.coherence) == first]
    return "cp1252" if any("cp1252" in match.could_be_from_charset for match in alike) else likely[0].encoding
