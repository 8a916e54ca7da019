"""Prompts as they are read under safety: what is seen as plain letters is read as plain letters.

To people "\u0441hurch" with a Cyrillic letter is a church, and models often draw one, although tokens split it into bytes that
no safety was taught.
"""

from __future__ import annotations

import re
import unicodedata

#: Letter -> letters that look like it, or whose other case does: Unicode's confusables (UTS 39) of one letter and a plain one,
#: without those that NFKC takes to another in this table. CLIP's tokenizer reads lower case alone.
LOOKALIKES = {
    "a": "ɑΑαАаᎪᗅⱭꓮꭺ𐊠𖽀",
    "b": "ƄƅΒβВЬвьᏏᏴᏼᑲᖯᗷᲀꓐꞴꞵꮟ𐊂𐊡𐌁",
    "c": "ϲϹСсᏟᲃᴄⲤⲥꓚꮯ𐊢𐌂𐐕𐐽𐔜",
    "d": "ԀԁᎠᏧᑯᗞᗪꓒꓓꭰꮷ",
    "e": "ΕεЕеҼҽᎬⴹꓰꬲꭼ𐊆𑢦𑢮𑣆𑣎",
    "f": "ϜϝՔքᖴẝꓝꞘꞙꬵ𐊇𐊥𐔥𑢢𑣂",
    "g": "ƍɡԌԍՑցᏀᏳᏻᶃꓖꞬꮐ",
    "h": "ΗηНнҺһՀհᎻᏂᕼⲎⲏꓧꮋꮒ𐋏",
    "i": "ıɩɪͺιіӏᎥꙆꙇꞮꭵ𑣃",
    "j": "ʝͿϳЈјᎫᒍꓙꞲꭻ",
    "k": "ΚκКкᏦᛕⲔⲕꓗꮶ𐔘",
    "l": "ƖǀΙІӀᏞᒪᛁⲒⲓⳐⳑⵏꓡꓲꮮ𐊊𐌉𐐛𐑃𐔦𑢣𑢲𑣒𖼖𖼨",
    "m": "ΜμϺϻМмᎷᗰᛖⲘⲙꓟꮇ𐊰𐌑",
    "n": "ΝՈՌոռⲚⲛꓠ𐔓",
    "o": "ΟΣοσОоՕօଠഠဝჿዐᲂᲿᴏᴑⲞⲟⵔꓳꬽ𐊒𐊫𐐄𐐬𐓂𐓪𐔖𑢨𑢵𑢷𑣈𑣕𑣗",
    "p": "ΡρРрᏢᑭⲢⲣꓑꮲ𐊕",
    "q": "ԚԛԳԶգզⵕ",
    "r": "ƦʀГгᎡᎱᏒᖇᴦⲄⲅꓣꭇꭈꭱꮁꮢ𐒴𐓜𖼵",
    "s": "ƼƽЅѕՏտᏕᏚꓢꜱꮥꮪ𐊖𐐠𐑈𑢡𑣁𖼺",
    "t": "ΤτТтᎢᲄᲅⲦⲧꓔꭲ𐊗𐊱𐌕𑢼𖼊",
    "u": "ƲʋυՍսሀᑌᴜꓴꞞꞟꭎꭒ𐓎𐓶𑢸𑣘𖽂",
    "v": "νѴѵᏙᐯᴠⴸꓦꛟꮩ𐔝𑜆𑢠𑣀𖼈",
    "w": "ƜɯѠѡԜԝԱաᎳᏔᴡꓪꮃꮤ𑜊𑜎𑜏",
    "x": "ΧχХхᕁᕽᚷⲬⲭⵝꓫꞳꭓ𐊐𐊴𐌗𐔧",
    "y": "ƔɣʏΓΥγУуҮүყᎩᎽᲧᶌỾỿⲨⲩꓬꭚꭹꮍ𐊲𑢤𑣜𖽃",
    "z": "ΖζᏃᴢꓜꮓ𑢩𑣄𑣉",
}  # fmt: skip
#: Cannot be seen: soft hyphen, joiners, fillers, marks of direction, variation selectors.
INVISIBLE = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    r"\uffa0"
)

_PLAIN = str.maketrans({look: letter for letter, looks in LOOKALIKES.items() for look in looks})
#: One class, repeated: the pattern reads a prompt once from left to right, whatever it holds.
_RUN = re.compile(rf"[\w{INVISIBLE}]+")
_LETTER = re.compile(r"\w")
_ASCII = frozenset(map(chr, range(128)))
_UNSEEN = re.compile(f"[{INVISIBLE}]")


def in_plain_letters(prompt: str) -> str:
    """`prompt` with each word that looks like one of plain letters and digits written in these. Takes time in proportion to
    its length.

    A word with one letter that looks like no plain one stays as it is, so that text in other alphabets nearly always does, and
    so do accents. Digits in the place of letters stay, too: "3" may be meant.
    """
    if prompt.isascii():
        return prompt
    table = str.maketrans(_plain_letters(set(prompt) - _ASCII))

    def plain_word(found: re.Match[str]) -> str:
        plain = found[0].translate(table)
        # Joiners between pictures are no word.
        return plain if plain.isascii() and _LETTER.search(found[0]) else found[0]

    return _RUN.sub(plain_word, prompt)


def _plain_letters(letters: set[str]) -> dict[str, str]:
    """What letters are read as: plain ones, nothing, or themselves.

    They are read one by one, a line each, since NFKC of a whole word is plain only where NFKC of each of its letters is: no
    plain letter, and no letter of the table, is composed of others. Putting the marks of a whole word in order would take time
    in proportion to the square of their number.
    """
    seen = _UNSEEN.sub("", "\n".join(letters)).translate(_PLAIN)
    read = unicodedata.normalize("NFKC", seen).translate(_PLAIN).split("\n")
    return {letter: plain if plain.isascii() else letter for letter, plain in zip(letters, read, strict=True)}
