"""Tasks: where problems come from and how a completion is checked, a module each.

A task module offers (see worksheet.py for one that offers everything):

    problems(split, **options)    -> random-access source of {"id", "problem", "gold", ...}, for
                                     Grain; its `skipped`, if it has one, lists lines left out
    verify(gold, completion)      -> bool; the reward, by default
    check_steps(gold, steps, finished) -> list[bool]; optional: exact step labels, for
                                     locate.locator="oracle"
    valid_order(gold, completion) -> str; optional: what tells right solutions apart, for counting
                                     distinct ones; "" for a wrong solution
"""
