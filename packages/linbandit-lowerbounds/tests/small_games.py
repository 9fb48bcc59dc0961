"""Exact dynamic programmes over small games with one hidden sign: what the best policy can reach.

A game: theta = +-gap with equal chance, `moves` rounds, action a = +-1, reward Bernoulli(base + theta a); a
round is wrong if a is not the sign of theta. The history matters through the counts n[a][r] of actions and
rewards. A policy maximises E f(wrong rounds), f >= 0, which covers the probability of being lucky and
exponential moments.
"""

import functools
import itertools


def _weight(counts, sign, gap, base):
    """P(these rewards in this order, theta = sign gap | these actions)."""
    weight = 0.5
    for action, row in zip((1, -1), counts, strict=True):
        prob = base + sign * action * gap
        weight *= prob ** row[1] * (1 - prob) ** row[0]
    return weight


def _after(counts, action, reward):
    """The counts with one more round."""
    rows = [list(row) for row in counts]
    rows[action][reward] += 1
    return tuple(tuple(row) for row in rows)


def _payoff(counts, gap, f, base=1 / 3):
    """Weighted f at the end of a game: the rounds with the other sign's action were wrong."""
    played = [sum(row) for row in counts]
    return _weight(counts, 1, gap, base) * f(played[1]) + _weight(counts, -1, gap, base) * f(played[0])


START = ((0, 0), (0, 0))


def best_alone(moves, gap, f, base=1 / 3):
    """max over policies of E f(wrong rounds) in one game."""

    @functools.cache
    def value(counts, left):
        if left == 0:
            return _payoff(counts, gap, f, base)
        return max(sum(value(_after(counts, a, r), left - 1) for r in (0, 1)) for a in (0, 1))

    return value(START, moves)


def best_together(games, order):
    """The same for E of the product over several games, all of whose rewards one player sees.

    Args:
        games: (moves, gap, f) of each.
        order: "chosen" by the player, "opposed" (nature picks the game that moves, to harm), or "cyclic".
    """

    @functools.cache
    def value(states, left, turn):
        movable = [g for g, moves in enumerate(left) if moves]
        if not movable:
            total = 1.0
            for counts, (_, gap, f) in zip(states, games, strict=True):
                total *= _payoff(counts, gap, f)
            return total
        if order == "cyclic":
            movable = [min(movable, key=lambda g: (g - turn) % len(games))]
        outcomes = []
        for g in movable:
            fewer = tuple(moves - (i == g) for i, moves in enumerate(left))
            outcomes.append(
                max(
                    sum(
                        value(
                            tuple(
                                _after(counts, a, r) if i == g else counts for i, counts in enumerate(states)
                            ),
                            fewer,
                            (g + 1) % len(games),
                        )
                        for r in (0, 1)
                    )
                    for a in (0, 1)
                )
            )
        return min(outcomes) if order == "opposed" else max(outcomes)

    return value(tuple(START for _ in games), tuple(moves for moves, _, _ in games), 0)


def lucky_probability(moves, gap, fewest):
    """max over policies of P(fewer than `fewest` wrong rounds)."""
    return best_alone(moves, gap, lambda wrong: float(wrong < fewest))


def fewest_wrong(moves, gap, base):
    """min over policies of E wrong rounds."""
    return moves - best_alone(moves, gap, lambda wrong: moves - wrong, base)


ORDERS = ("chosen", "opposed", "cyclic")
PAIRS = tuple(itertools.combinations_with_replacement(range(3), 2))
