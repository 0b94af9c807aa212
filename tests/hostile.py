r"""Hostile texts: completions with the verdict that is right, data lines with what is wrong.

Most are an ugly piece in several wrappings. A right answer stays right whatever surrounds its box.
"""

import json

GOLDS = ["5", r"\frac{\pi}{3}", "(x+1)^2"]
RIGHT = ["5", r"\frac{2\pi}{6}", "x^2+2x+1"]

# Values that no machine can write out; most of them run into the time limit.
ENDLESS = [
    "9^{9^9}", "10^{10^{10}}", "-10^{10^{10}}", "10^{-10^{10}}", "1000000!", "((10!)!)!",
    "9!!!!!!!", "9**9**9**9", "E**E**E**E**E", "e^{e^{e^{e^e}}}", "2^{2^{2^{2^{2^2}}}}",
    "99999999999^{99999999999}", r"\binom{10^{12}}{10^{11}}", r"\sum_{k=1}^{10^{12}} k^k",
    r"\prod_{k=1}^{10^{9}} k", r"\int_0^{\infty} x^{x^x} dx", r"\lim_{x \to 0} x^{x^{x^x}}",
    r"\sqrt[1000000007]{10^{10^9}}", r"\gcd(10^{10^6}, 10^{10^6}-1)", r"\tan(10^{10^{8}})",
    r"\zeta(10^{10^{5}})", r"\lfloor \pi^{10^{7}} \rfloor", r"123456789^{987654321} \bmod 7!",
]  # fmt: skip
# Numbers that are none, are too long, or mean something only to a programmer.
NUMBERS = [
    "1e999999", "-1e999999", "1e-999999999", "1E999999999999999999", "inf", "-inf", "Infinity",
    "NaN", "nan", "oo", "zoo", r"\infty", r"-\infty", "1/0", r"\frac{1}{0}", r"\frac{0}{0}",
    "0^{-1}", "0/0", "0x1p999999", "0b101010", "0o7777", "1_000_000", "5e", "5e+", "--5", "5-",
    "+-+-5.", "5..5", "5,5,5,,", "٥٥", "Ⅴ+1", r"\text{" + "five" * 100 + "}", "5" * 41, "5" * 4301,
    "5." + "5" * 4301, "5/" + "7" * 4301, "5 cm^2 kg", "5 m/s",
    r"5 \text{ apples and } 6 \text{ pears}", "5°", r"5^\circ", r"5\%", "€5,6", "6 million",
]  # fmt: skip
# LaTeX that closes what it never opened, or the other way round.
BROKEN = [
    r"\frac{1}{2", r"\frac{1}", r"\frac{", r"\frac", r"\frac}{", r"\frac{}{}", r"\frac{1}{2}}",
    r"\sqrt{", r"\sqrt[", r"\sqrt[3]{", r"\sqrt[{]}", r"\left(", r"\left", r"\right)",
    r"\left( 1 \right", r"\left.", "{", "}", "{{", "}}", "}{", "{}", "(", ")", ")(", "[", "]", "$",
    "$$", "$$$", r"\(", r"\)", r"\[", r"\]", r"\begin{pmatrix}", r"\end{pmatrix}",
    r"\begin{pmatrix} 1 & 2 \\", r"\begin{matrix} & & & \end{pmatrix}", r"\begin{cases} 5",
    r"\text{", r"\text{5", r"\mathrm", r"\operatorname{", "^", "_", "x^", "x_", "x^{", "x^^2",
    "x__2", "^{^{^{", "&", r"\\", "\\", "%", "#", "~", r"\{", r"\}", r"\{5", r"\langle 5", "|5",
    "||", "=", "==", "5=", "=6", "<", "5<", r"\le", r"\cdot", "+", "*", "/", "!", "!5", r"\pm",
    r"\overline{", r"\int_", r"\sum_{", r"\boxed", r"\boxed{", r"\boxed{\boxed{", r"\boxed\boxed",
    r"\boxed[5]", "\\boxed\x00{6}", r"\fbox{5",
]  # fmt: skip
# Code that must stay text. MARK is the path of a file that none of them may make.
CODE = [
    "__import__('os').system('touch MARK')", "__import__('os').mkdir('MARK')", "open('MARK', 'w')",
    "eval(\"open('MARK', 'w')\")", "exec('open(\\'MARK\\', \\'w\\')')", "$(touch MARK)",
    "`touch MARK`", "; touch MARK;", "| tee MARK", r"\input{|touch MARK}", r"\write18{touch MARK}",
    r"\immediate\openout5=MARK", r"\input{/etc/passwd}", r"\def\x{\x\x}\x",
    "().__class__.__bases__[0].__subclasses__()", "{0.__class__.__init__.__globals__}", "{self}",
    "%s%s%s%n%n", "%(gold)s", "${gold}", "{{7*7}}", "{gold!r}", "gold", "True", "truth",
    "answers[0]", "exit()", "quit()", "os", "os._exit(0)", "sys.exit(0)", "raise SystemExit",
    "lambda: 5", "lambda x: x", "import os", "while True: pass", "def f(): return f()",
    "Symbol('x')", "sympify('5')", "S(5).evalf(10**9)", "factorial(10**9)", "factorint(10**80+1)",
    "N(pi, 10**9)", "E", "I", "S", "Q", "C", "O", "beta", "gamma", "<script>alert(5)</script>",
    "'; DROP TABLE golds; --", "\x1b[2J\x1b[31m6\x1b[0m", "\x1b]0;title\x07", "\x1bc",
]  # fmt: skip
# What could break out of the pipes' JSON lines.
PROTOCOL = [
    "true", "\ntrue\n", '"ready"', '\n"ready"\n', '"slow"', "null", "\n", "\r\n", "\r", "\x00",
    "\x04", "\x1a", '"', '\\"', '"]\n["5", ["$5$"], 5]\n', '", ["$5$"], 5]\ntrue\n["',
    '["5", ["$5$"], 5]', "\u2028true\u2029", "\x85true\x85", "\\u0022", "\\n", "\\ud800", "\ud800",
    "\udfff\ud800", "\U0010ffff", "\ufffd", "\ufeff", "\uffff",
]  # fmt: skip
# Characters that show as nothing or as something else.
UNSEEN = [
    "\u200b", "\u200c\u200d", "\u2060", "\u00ad", "\u200e", "\u200f", "\u202e",
    "\u2066\u202e\u2069", "\u0301" * 500, "\u034f", "\u115f", "\u3164", "\u00a0", "\u3000",
    "\x0b\x0c", "\x7f", "\U000e0041", b"\xff\xfe\x80\xc3(".decode(errors="replace"),
    b"\xed\xa0\x80".decode(errors="surrogateescape"), "e\u0301\u0327" * 50, "\U0001f600", "𝟝𝟞",
    "５６", "۵۶", "¹²³", "½½", "∑∏∫√∞≠≤", "שלום 6", "مرحبا 6",
]  # fmt: skip
# A megabyte of one thing.
PIECES = [
    "7", "a", " ", "\n", "\t", "\\", "$", "{", "}", "(", "[", ",", "-", "^", "_", "!", "#", "\x00",
    "\ud800", "é", "\u200b", "1,", "1+", "a b ", "\\boxed{", "\\boxed{}", "\\boxed{6}", "#### ",
    "####\n", "\\frac{", "\\sqrt", "\\left(", "$x$ ", "answer is ", "The final answer is $6$. ",
    "final answer: ", "\\text{", "\\\\ ", "& ", "\\{", "\x1b[31m", "x^{", "1/", "0.", "e", "%",
    "\r\n",
]  # fmt: skip
NESTS = [
    ("(", ")"), ("{", "}"), ("[", "]"), (r"\left(", r"\right)"), (r"\frac{1}{", "}"),
    (r"\sqrt{", "}"), ("x^{", "}"), (r"\text{", "}"), (r"\{", r"\}"), ("|", "|"), (r"\boxed{", "}"),
    ("-(", ")"), ("2^(", ")"),
]  # fmt: skip
LARGE = [
    r"\begin{pmatrix}" + r" \\ ".join(["1 & " * 315 + "1"] * 316) + r"\end{pmatrix}",
    r"\begin{pmatrix}" + r" \\ ".join(["1 & 2 & 3 & 4"] * 200) + r"\end{pmatrix}",
    r"\{" + ", ".join(map(str, range(3000))) + r"\}", r"\{" + "1, " * 50_000 + r"1\}",
    "(" + ", ".join(map(str, range(3000))) + ")", r"(0, 1) \cup " * 500 + "(0, 1)",
    r"[1, 2) \cap " * 300 + "(1, 2]", "x = 1, " * 1000, " < ".join("abcdefgh" * 50),
    "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(800)), "(x+y+z+w)^{500}", "(1+x)(1+x^2)" * 200,
    "x^{1000}-1", r"\sin(" * 150 + "x" + ")" * 150, "-" * 5000 + "6",
]  # fmt: skip


def completions(mark: str = "MARK") -> list[tuple[str, str, bool]]:
    """Returns (gold, completion, right?) triples; `mark` is the path that CODE tries to make."""
    code, triples = [text.replace("MARK", mark) for text in CODE], []
    for i, text in enumerate([*ENDLESS, *NUMBERS]):
        wrapped = [f"\\boxed{{{text}}}", f"#### {text}", f"The answer is ${text}$.", text]
        triples += [("4", t, False) for t in wrapped[: 2 if text in ENDLESS and i % 4 else 4]]
        triples.append((text, f"\\boxed{{{text}}}", True))  # a bad gold, word for word
    for text in BROKEN:
        triples += [(r"\frac{3}{7}", f"\\boxed{{{text}", False), ("3", f"So\n#### {text}", False)]
    for text in [*code, *PROTOCOL, *UNSEEN, *LARGE]:
        triples += [(r"\sqrt{3}", t, False) for t in (f"\\boxed{{{text}}}", f"Hence {text}")]
    for first, last in NESTS:
        for depth in (200, 20_000):
            cut = first * depth + "6"
            whole = cut + last * depth
            triples += [(r"\sqrt{3}", t, False) for t in (f"\\boxed{{{whole}}}", whole, cut)]
    for piece in PIECES:
        mass = piece * (1_000_000 // len(piece))
        triples += [(r"\sqrt{3}", t, False) for t in (mass, f"\\boxed{{{mass}}}", f"#### {mass}")]
    for text in (
        "",
        " ",
        "\n",
        "\t \r\n",
        r"\boxed{}",
        r"\boxed{ }",
        "####",
        "$$",
        "\u200b",
    ):
        triples += [("5", t, False) for t in (text, f"5 \\boxed{{{text}}}", f"5\n#### {text}\n5")]
    for text in (
        "\u00ad",
        "\u200b",
        "\u200c\u200d",
        "\u200e",
        "\u200f",
        "\u2060",
        "\ufeff",
        "\u00a0",
    ):
        for right, gold in ((True, "15"), (False, "16")):  # a right answer with nothing in between
            boxes = f"\\boxed{{{text}15{text}}}", f"#### {text}$15${text}\nBye"
            triples += [(gold, t, right) for t in boxes]
        triples.append(("x+1", f"\\boxed{{{text}1+{text}x}}", True))
    around = [*ENDLESS, *NUMBERS, *code, *PROTOCOL, *UNSEEN, *LARGE]
    around += [piece * 9999 for piece in PIECES if "boxed" not in piece]
    for i, text in enumerate(around):
        gold, box = GOLDS[i % 3], f"\\boxed{{{RIGHT[i % 3]}}}"
        triples += [(gold, t, True) for t in (f"{text}\nIt is\n{box}", f"{box}\n{text}")]
    return triples


ROW = {"problem": "What is 2+3?", "answer": "5", "solution": "2+3=5"}
VALUES = [None, True, False, 3, 0.5, [], ["5"], {}, {"text": "5"}]


def bad_lines() -> list[tuple[bytes, str]]:
    """Returns (line of a data file, how the reason of its refusal starts) pairs."""
    text = json.dumps(ROW)
    pairs = [(text[:end].encode(), "not valid JSON: ") for end in range(1, len(text))]
    junk = [text + "}", text + text, text[1:], "'" + text, text.replace('"', "'"), "nothing", "{,}"]
    junk += [
        '{"problem": "p", "answer": ' + a + "}" for a in ("NaN", "Infinity", "-Infinity", "05")
    ]
    junk += ['{"problem": "p", "answer": ' + a + "}" for a in ("+5", "5.", ".5", "0x5", "5" * 5000)]
    junk += [opener * 100_000 for opener in ("[", '{"a":', '[{"problem":')]
    junk += ['{"problem": ' + "[" * 100_000 + "]" * 100_000 + ', "answer": "5"}']
    pairs += [(line.encode(), "not valid JSON: ") for line in junk]
    good = text.encode()
    inside = [bytes([byte]) for byte in [*range(0x80, 0x100), *range(9), *range(11, 32)]]
    inside += [
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"\xe2\x82",
        b"\xff\xfe",
        b'"',
        b"\\x",
    ]
    pairs += [
        (good.replace(b"What", b"Wh" + piece + b"at"), "not valid JSON: ") for piece in inside
    ]
    pairs += [(text.encode(code), "not valid JSON: ") for code in ("utf-16", "utf-16-be", "utf-32")]
    values = [value for value in VALUES if not isinstance(value, dict)]
    pairs += [(json.dumps(v).encode(), "a JSON object per line expected, got ") for v in values]

    def change(reason, **changes):
        pairs.append((json.dumps({**ROW, **changes}).encode(), reason))

    for value in [*VALUES, "", " \n\t"]:
        change('no "problem"', problem=value)
        if type(value) not in (int, float):
            change('no "answer"', answer=value)
        if value is not None and not isinstance(value, str):
            change('"solution" is not text', solution=value)
        if value is not None and type(value) not in (int, str):
            change('"id" must be a text or a number', id=value)
    for name in ROW:
        for code in (*range(0xD800, 0xE000, 100), 0xDFFF):
            change("half a surrogate pair", **{name: f"5{chr(code)}"})
        change("a NUL character", **{name: "5\0"})
        change("longer than 4,194,304 bytes", **{name: "5" * 10_000_000})
    for gold in (
        "$$",
        "$ $",
        r"\boxed{}",
        r"\boxed{ }",
        r"\text{}",
        "**",
        ".",
        r"\left\right",
        r"\(\)",
    ):
        change('"answer" holds nothing', answer=gold)
    change('no answer after "####"', answer="2+3=5\n#### ")
    change("GSM8K's answer ends in", question="What is 2+3?")
    pairs += [
        (b'{"problem": "p", "answer": ' + n + b"}", 'no "answer"') for n in (b"1e999", b"-1e999")
    ]
    pairs += [(b"{}", 'no "problem"'), (b'{"problem": "p"}', 'no "answer"')]
    return pairs


def good_lines() -> list[bytes]:
    """Returns lines that look bad and are good."""
    texts = [
        *ENDLESS,
        *NUMBERS,
        *CODE,
        *UNSEEN,
        *BROKEN,
        *PROTOCOL,
        "5" * 100_000,
        "\U0001f600" * 99,
    ]
    texts = [text for text in texts if text.strip() and "\0" not in text]
    texts = [text for text in texts if text == text.encode(errors="replace").decode()]
    lines = [json.dumps({**ROW, "problem": text}, ensure_ascii=False).encode() for text in texts]
    lines += [json.dumps({**ROW, "problem": text, "solution": text}).encode() for text in texts]
    changes = [
        {"answer": 5},
        {"answer": -0.5},
        {"answer": 10**400},
        {"solution": None},
        {"solution": " "},
    ]
    changes += [
        {"id": None},
        {"id": 7},
        {"id": "7"},
        {"_source": "elsewhere:1"},
        {"more": VALUES},
        {},
        {},
    ]
    lines += [json.dumps({**ROW, **change}).encode() for change in changes]
    plain = json.dumps(ROW).encode()
    lines += [b"\xef\xbb\xbf" + plain, b" \t" + plain + b" \r", plain[:-1] + b', "a": ' + b"[" * 50]
    lines[-1] += b"]" * 50 + b"}"
    return lines
