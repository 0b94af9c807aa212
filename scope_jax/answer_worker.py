"""The worker process of `scope_jax.rewards`: asks math-verify whether answers are equal.

It is this file run by its path, so that it imports neither the package nor jax, nor the caller's
`__main__`; hence nothing but the standard library is imported up here. POSIX only.
"""

import contextlib
import json
import logging
import os
import sys
import time

WORKER_BYTES = 2 << 30  # address space of one worker


def parse_in_two_stages() -> None:
    """Makes latex2sympy parse by ANTLR's fast prediction first; most of a check's time is parsing.

    The fast one (SLL) ends in the tree of the full one (LL) or in a syntax error
    (https://www.antlr.org/papers/allstar-techreport.pdf); after an error the full one has its turn.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    class TwoStages(latex2sympy2._Latex2Sympy):
        mode = PredictionMode.LL

        def create_parser(self, latex_str):
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = self.mode
            return parser

        def parse(self, latex_str):
            self.mode = PredictionMode.SLL
            try:
                return super().parse(latex_str)
            except Exception:  # the time limit's is a BaseException, and passes
                self.mode = PredictionMode.LL
                return super().parse(latex_str)

    latex2sympy2._Latex2Sympy = TwoStages


def with_imaginary_unit(parsed: list) -> list:
    """Returns what math-verify parsed, i being no variable but the root of -1."""
    import sympy

    found = []
    for item in parsed:
        names = {name for name in getattr(item, "free_symbols", ()) if name.name == "i"}
        found.append(item.xreplace(dict.fromkeys(names, sympy.I)) if names else item)
    return found


def serve() -> None:
    """Answers requests [gold, readings, timeout] on stdin, until it closes: true, false, "slow"."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever sympy or antlr print must not mix with the replies

    def send(reply: str | bool) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    try:
        import math_verify
        from math_verify.errors import TimeoutException

        with contextlib.suppress(ImportError, AttributeError):  # of another version: slower
            parse_in_two_stages()
        math_verify.parse("$\\frac{1}{2}$")  # builds the parser's tables before the clock runs
    except Exception as error:
        return send(repr(error)[:1000])
    send("ready")
    max_cpu_seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin.buffer:
        gold, readings, timeout = json.loads(line)
        start, limit = time.monotonic(), max(1, int(timeout / 2))  # below the caller's own limit
        # If the caller is killed meanwhile, only this ends a C call that would run for hours.
        cpu_seconds = int(time.process_time() + 2 * timeout) + 2
        with contextlib.suppress(ValueError):  # the user's own limit is lower
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, max_cpu_seconds))
        try:
            truth = math_verify.parse(gold, parsing_timeout=limit)
            answers = [a for r in readings for a in math_verify.parse(r, parsing_timeout=limit)]
            equal = bool(math_verify.verify(truth, answers, timeout_seconds=limit))
            pair = with_imaginary_unit(truth), with_imaginary_unit(answers)
            if not equal and pair != (truth, answers):
                equal = bool(math_verify.verify(*pair, timeout_seconds=limit))
        except (Exception, TimeoutException):  # hostile text finds every kind of error
            equal = False
        send("slow" if not equal and time.monotonic() - start >= limit else equal)


if __name__ == "__main__":
    serve()
