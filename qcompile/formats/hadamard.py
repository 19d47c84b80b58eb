"""Hadamard matrices of many orders, built, not tabulated.

A Hadamard matrix H of order n has entries +-1 and orthogonal rows. Constructions used:

* Sylvester: the Kronecker product of two Hadamard matrices is one; orders 1 and 2 give all powers of two.
* Paley I: for a prime q = 3 mod 4, of order q + 1, from the quadratic residues modulo q.
* Paley II: for a prime q = 1 mod 4, of order 2 (q + 1).

Source: Paley, "On orthogonal matrices" (1933). Together they reach all multiples of 4 up to 88 but 52 (which needs a
prime power), 36 coming from q = 17; the others are refused.
"""

from __future__ import annotations

import functools

import numpy as np

from qcompile.errors import FormatError


@functools.cache
def hadamard_signs(n: int) -> np.ndarray:
    """A Hadamard matrix of order ``n``, int8 ``(n, n)``.

    Raises:
        FormatError: no construction known here has this order.
    """
    core, power = factors(n)
    signs = np.array([[1]], np.int8)
    for _ in range(power):
        signs = np.kron(signs, np.array([[1, 1], [1, -1]], np.int8))
    result = np.kron(_paley(core), signs) if core > 1 else signs
    result.flags.writeable = False
    return result


def hadamard_matrix(n: int) -> np.ndarray:
    """The orthonormal Hadamard matrix ``signs / sqrt(n)``, float64 ``(n, n)``.

    Raises:
        FormatError: no construction known here has this order.
    """
    return hadamard_signs(n) / np.sqrt(n)


@functools.cache
def factors(n: int) -> tuple[int, int]:
    """``(core, power)`` with ``n = core * 2^power`` and the smallest core of Paley's constructions (1 if none is needed).

    Raises:
        FormatError: there is none.
    """
    if n >= 1:
        rest, power = n, 0
        while rest % 2 == 0:
            rest, power = rest // 2, power + 1
        if rest == 1:
            return 1, power
        for taken in range(power + 1):
            if _is_paley(rest << taken):
                return rest << taken, power - taken
    raise FormatError(f"no Hadamard matrix of order {n} is known here; use a block size that divides the width")


def largest_block(n: int, most: int = 1 << 15) -> int:
    """The largest power of two up to ``most`` that divides ``n``: the order of a block-diagonal transform."""
    block = 1
    while n % (2 * block) == 0 and 2 * block <= most:
        block *= 2
    return block


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _is_paley(n: int) -> bool:
    return (n % 4 == 0 and _is_prime(n - 1)) or (
        n % 4 == 0 and n // 2 % 2 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1
    )


def _paley(n: int) -> np.ndarray:
    first = _is_prime(n - 1) and (n - 1) % 4 == 3
    q = n - 1 if first else n // 2 - 1
    residues = {i * i % q for i in range(1, q)}
    symbol = np.array([0] + [1 if i in residues else -1 for i in range(1, q)])
    jacobsthal = symbol[(np.arange(q)[None] - np.arange(q)[:, None]) % q]
    conference = np.zeros((q + 1, q + 1), np.int64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if first else 1
    conference[1:, 1:] = jacobsthal
    identity = np.eye(q + 1, dtype=np.int64)
    if first:
        return (identity + conference).astype(np.int8)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(conference, plus) + np.kron(identity, minus)).astype(np.int8)
