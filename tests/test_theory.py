"""The laboratory's parts, each against something known: exact equality where exactness is the claim."""

from __future__ import annotations

import doctest
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from scaling_exps import rules, theory
from scaling_exps.theory import discrete, exact, keyed, oracles, problem, result, sde
from scaling_exps.theory.oracles import Base, Linear, Logistic, Noise, Quadratic, TwoWell
from scaling_exps.theory.problem import Problem, reference
from scaling_exps.theory.result import ratio

ALGORITHMS = ("rmsprop", "adam", "sgd")


# --- randomness: a function of its key


@pytest.mark.parametrize(("kind", "shape", "skew"), [
    ("gaussian", 0.0, 0.0), ("rademacher", 0.0, 0.0), ("exponential", 0.0, 2.0), ("gamma", 4.0, 1.0),
    ("gamma", 0.7, 2 / math.sqrt(0.7)), ("student_t", 9.0, 0.0),
])  # fmt: skip
def test_noise_has_mean_0_variance_1_and_its_skewness(kind, shape, skew):
    x = keyed.draws(kind, shape, 5, 0, 1 << 18, 2, 3).ravel()
    n = len(x)
    for power, value in ((1, 0.0), (2, 1.0), (3, skew)):
        y = x**power
        assert abs(y.mean() - value) < 5 * y.std() / math.sqrt(n) + 1e-12  # 5 sigma: p = 6e-7 a line


def test_normals_are_normal():
    x = keyed.draws("gaussian", 0, 3, 0, 1 << 18, 1, 1)[:, 0]
    assert stats.kstest(x, "norm").pvalue > 1e-4
    pairs = np.corrcoef(x[:-128], x[128:])[0, 1]  # the two halves of one Box-Muller pair lie 128 apart
    assert abs(pairs) < 5 / math.sqrt(len(x))


def test_a_path_does_not_depend_on_which_others_are_drawn():
    whole = keyed.brownian(9, 0, 2000, 3, 4, 11)
    np.testing.assert_array_equal(keyed.brownian(9, 700, 77, 3, 4, 11), whole[700:777])
    whole = keyed.draws("gaussian", 0, 9, 0, 2000, 3, 11)
    np.testing.assert_array_equal(keyed.draws("gaussian", 0, 9, 1999, 1, 3, 11), whole[1999:])
    assert abs(keyed.draws("gaussian", 0, 10, 0, 2000, 3, 11) - whole).min() > 0


def test_refining_dt_refines_the_same_brownian_path():
    coarse = np.stack([keyed.brownian(1, 0, 4096, 2, 3, i) for i in range(16)])
    fine = np.stack([keyed.brownian(1, 0, 4096, 2, 6, i) for i in range(128)])
    np.testing.assert_allclose(fine.reshape(16, 8, 4096, 2).sum(1), coarse, atol=1e-14)
    scaled = fine.reshape(128, -1) * 8
    assert abs(scaled.var() - 1) < 5 * math.sqrt(2 / scaled.size)
    R = np.corrcoef(scaled) - np.eye(128)
    assert abs(R).max() < 6 / math.sqrt(8192)  # 8128 pairs


# --- oracles


@pytest.mark.parametrize("oracle", [
    Quadratic([[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.3], [0.3, 0.5]], [0.2, -1.0]), TwoWell(2, 1.5), Linear([1.0, -2.0]),
    Logistic(features=3),
])  # fmt: skip
def test_oracle_gradient_and_covariance(oracle):
    x = np.random.default_rng(0).normal(size=(4, oracle.dim))
    h = 1e-6
    for i in range(oracle.dim):
        e = h * np.eye(oracle.dim)[i]
        np.testing.assert_allclose((oracle.f(x + e) - oracle.f(x - e)) / (2 * h), oracle.grad(x)[:, i], atol=1e-7)
    R = oracle.root(x)
    np.testing.assert_allclose(R @ R.swapaxes(-1, -2), oracle.cov(x), atol=1e-12)
    n, at = 40_000, np.tile(x[:1], (40_000, 1))
    z = (oracle.draw(at, 0.5, 1, 0, 0) if n == len(at) else at) - oracle.grad(x[:1])
    S = np.broadcast_to(oracle.cov(x[:1]), (1, oracle.dim, oracle.dim))[0]
    assert (abs(z.mean(0)) < 5 * 0.5 * np.sqrt(np.diag(S) / n)).all()
    assert abs(np.cov(z.T) / 0.25 - S).max() < 0.06 * abs(S).max()  # relative se about 0.8% (kurtosis < 6)
    assert all(c.reason for c in oracle.conditions())


def test_a_logistic_draw_is_a_mini_batch():
    o = Logistic(features=2)
    x = np.full((3, 2), 0.4)
    g = o.draw(x, 1 / math.sqrt(5), 0, 0, 7)
    chosen = keyed.picks(0, 0, 3, 7, 5, len(o.A))
    per_example = o._weights(x[:1])[0][:, None] * o.A
    np.testing.assert_allclose(g, np.stack([per_example[c].mean(0) for c in chosen]) + o.l2 * x, atol=1e-13)


def test_conditions_name_what_fails():
    failing = {k: [c.name for c in Noise(k).conditions() if not c.holds] for k in keyed.LAWS}
    assert failing["gaussian"] == failing["rademacher"] == failing["gamma"] == []
    assert failing["exponential"] == ["low skewness"]
    assert failing["student_t"] == ["bounded moments", "low skewness"]


# --- discrete side: the training classes, by hand and fused


def by_hand(p, chain, seed):
    """Section 1's formulas, in numpy, on the oracle's draws."""
    hyper, sigma = chain.hyper, chain.sigma
    x0, m0, u0 = p.start
    x, m, v = (np.tile(a, (64, 1)) for a in (x0, m0, sigma**2 * u0))
    for k in range(chain.steps):
        g = p.oracle.draw(x, sigma, seed, 0, k)
        if p.algorithm == "sgd":
            x = x - hyper.lr * g
        elif p.algorithm == "rmsprop":
            x, v = x - hyper.lr * g / (np.sqrt(v) + hyper.eps), hyper.betas[0] * v + (1 - hyper.betas[0]) * g**2
        else:
            b1, b2 = hyper.betas
            m = b1 * m + (1 - b1) * g
            j = chain.k0 + k
            x = x - hyper.lr * (m / (1 - b1 ** (j + 1))) / (np.sqrt(v / (1 - b2**j)) + hyper.eps)
            v = b2 * v + (1 - b2) * g**2
    return np.concatenate([x, m, v / sigma**2], 1).T


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_training_classes_are_the_papers_formulas(algorithm):
    p = reference(algorithm, Noise("exponential"))
    chain = replace(p.discretise(1 / 8), steps=5)
    states = discrete.run(p, chain, [5], paths=64, seed=2)[0]
    np.testing.assert_allclose(states, by_hand(p, chain, 2), rtol=1e-12)


@pytest.mark.parametrize("kind", keyed.LAWS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_fused_loop_equals_the_training_classes(algorithm, kind):
    p = reference(algorithm, Noise(kind, dof=5.0))
    chain = p.discretise(1 / 8).svag(2)
    observe = np.array([0, 7, chain.steps])
    fused = discrete.run_fused(p, chain, np.zeros((chain.steps, 2)), observe, blocks=1, first_block=2, seed=3)
    real = discrete.run(p, chain, observe, paths=256, seed=3, first=512)
    np.testing.assert_allclose(fused[:, :6], real, rtol=1e-9, atol=1e-12)


def test_old_v_and_new_v_part_where_noise_is_skewed():
    """E of one RMSprop step is -eta grad/(sqrt(v0)+eps) for OLD v whatever the skewness; NEW v adds a drift."""
    oracle = Linear([0.5], noise=Noise("exponential"))
    p = Problem("rmsprop", oracle, x0=0.0, u0=1.0, eps0=0.1)
    chain = replace(p.discretise(1 / 4), steps=1)
    hyper, sigma = chain.hyper, chain.sigma
    x = discrete.run(p, chain, [1], paths=200_000, seed=0)[0, 0]
    expected = -hyper.lr * 0.5 / (sigma + hyper.eps)
    assert abs(x.mean() - expected) < 4.5 * x.std() / math.sqrt(len(x))
    g = oracle.draw(np.zeros((200_000, 1)), sigma, 0, 0, 0)[:, 0]
    swapped = -hyper.lr * g / (np.sqrt(hyper.betas[0] * sigma**2 + (1 - hyper.betas[0]) * g**2) + hyper.eps)
    assert abs(swapped.mean() - expected) > 30 * x.std() / math.sqrt(len(x))  # the test can tell


# --- exact moments and the simulators


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_frozen_twin_has_the_moments_it_claims(algorithm):
    p = reference(algorithm, Noise("exponential"))
    chain = p.discretise(1 / 8).svag(2)
    end = np.array([chain.steps])
    twin = exact.frozen_twin(p, chain, end)
    s = discrete.run_fused(p, chain, twin.factors, end, blocks=256, first_block=0, seed=1)[0, 6:]
    m = twin.moments[0]
    y = s[: len(m.mean)]
    assert (abs(y.mean(1) - m.mean) < 5 * np.sqrt(np.diag(m.cov) / y.shape[1])).all()
    np.testing.assert_allclose(np.cov(y), m.cov, atol=0.03 * np.diag(m.cov).max())
    if algorithm != "sgd":
        assert (abs(s[4:].mean(1) - m.u) < 5 * s[4:].std(1) / math.sqrt(y.shape[1])).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("increments", ["normal", "two_point"])
def test_the_simulated_sde_has_the_exact_moments(algorithm, increments):
    """Heun at dt = 1/64 (weak error about 1e-4) against the moment equations; also catches a lost gamma."""
    p = reference(algorithm)
    m = exact.sde_moments(p, np.array([0.5, 2.0]))[1]
    s = sde.simulate(p, 1 / 64, np.array([0.5, 2.0]), paths=1 << 17, seed=4, scheme="heun", increments=increments)[1]
    y = s[: len(m.mean)]
    assert (abs(y.mean(1) - m.mean) < 5 * np.sqrt(np.diag(m.cov) / y.shape[1]) + 3e-4).all()
    np.testing.assert_allclose(np.cov(y), m.cov, atol=0.02 * np.diag(m.cov).max())
    if algorithm != "sgd":
        np.testing.assert_allclose(s[4:, 0], m.u, atol=2e-5)


def test_adam_moments_against_the_formula_written_out():
    """gamma_1, gamma_2 and eps, once more: a noiseless Adam SDE integrated by hand with the paper's formula."""
    p = Problem("adam", Quadratic([1.0], [[1e-30]]), x0=1.0, m0=0.2, u0=0.5, c1=2.0, c2=0.7, eps0=0.4, t0=0.5)
    x, m, u, n = 1.0, 0.2, 0.5, 200_000
    for k in range(n):
        t = 0.5 + k / n
        g1, g2 = 1 - math.exp(-2.0 * t), 1 - math.exp(-0.7 * t)
        dx = -math.sqrt(g2) / g1 * m / (math.sqrt(u) + 0.4 * math.sqrt(g2))
        x, m, u = x + dx / n, m + 2.0 * (x - m) / n, u - 0.7 * u / n
    moments = exact.sde_moments(p, np.array([1.0]))[0]
    np.testing.assert_allclose([*moments.mean, moments.u[0]], [x, m, u], atol=3e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_plain_simulator_equals_the_fused_one(algorithm):
    p = reference(algorithm)

    class Same(Base):
        def grad(self, x):
            return p.oracle.grad(x)

    plain = Problem(
        algorithm, Same(2, p.oracle.cov(None)), *p.start, p.sigma0, p.eps0, p.c1, p.c2, p.t0, p.horizon
    )  # fmt: skip
    a, b = (sde.simulate(q, 1 / 16, np.array([0.5, 1.0]), paths=300, seed=1) for q in (p, plain))
    np.testing.assert_allclose(a[:, :2], b[:, :2], atol=1e-12)


def test_the_rule_and_svag_leave_the_sdes_constants_alone():
    """sigma eta, eps eta, (1 - beta)/eta^2 before and after, through `rules` (paper, section 5 and 6)."""
    p = reference("adam")
    base = p.discretise(1 / 64)
    for chain in (base.scaled(rules.RULES["sqrt"], 4), base.svag(3)):
        h, eta = chain.hyper, chain.hyper.lr
        constants = [chain.u_scale * eta, h.eps * eta, *((1 - beta) / eta**2 for beta in h.betas), chain.steps * eta**2]
        np.testing.assert_allclose(constants, [p.sigma0, p.eps0, p.c1, p.c2, p.horizon], rtol=1e-12)
    for ell in (1, 2, 5):
        w = rules.svag_weights(ell, "adaptive")
        assert math.isclose(sum(x * x for x in w), ell**2)


def test_svag_at_ell_1_is_the_plain_run():
    base = reference("adam").discretise(1 / 8)
    assert base.svag(1) == base


# --- intervals


def test_fiellers_interval_covers_a_ratio_as_often_as_it_says():
    """a ~ N(2, 0.3), b ~ N(0.5, 0.2): the true ratio 4 lies inside in 95% of 20,000 pairs (se 0.15%, 5 sigma), also
    where b is not told from 0 and the interval is open above. The delta method covers 90% here."""
    rng = np.random.default_rng(0)
    intervals = [ratio(a, 0.3, b, 0.2) for a, b in rng.normal([2.0, 0.5], [0.3, 0.2], (20_000, 2))]
    assert abs(np.mean([low <= 4 <= high for low, high in intervals]) - 0.95) < 0.008
    assert any(math.isinf(high) for _, high in intervals)


def test_a_slope_and_its_interval_are_those_of_weighted_least_squares():
    """Against scipy's minimiser of the same chi^2; errors that scatter by what they claim give se = unscaled."""
    x, se = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([0.01, 0.02, 0.05, 0.1, 0.3])
    error = x**1.5 * np.exp([0.03, -0.02, 0.01, 0.02, -0.04])
    fit = result.fit(x, error, se, floor=0.05)
    sigma = np.hypot(se / error, 0.05)
    line, cov = optimize.curve_fit(
        lambda a, k, c: k * a + c, np.log(x), np.log(error), sigma=sigma, absolute_sigma=True
    )
    assert math.isclose(fit.slope, line[0], rel_tol=1e-6)
    assert math.isclose(fit.interval[1] - fit.slope, 1.96 * math.sqrt(cov[0, 0]), rel_tol=1e-4)


# --- refusals


@pytest.mark.parametrize(("build", "words"), [
    (lambda: reference("rmsprop").discretise(1.0), ("eta^2=1", "< 1", "smaller")),
    (lambda: Problem("rmsprop", TwoWell(), u0=0.0), ("u0=[0.0]", "> 0", "start from")),
    (lambda: Problem("adam", TwoWell()), ("t0=0.0", "t0 > 0", "pass")),
    (lambda: Problem("rmsprop", TwoWell(), sigma0=0.0), ("sigma0=0.0", "> 0", "pass")),
    (lambda: Noise().shape(-1.0), ("sigma=-1.0", "> 0", "pass")),
    (lambda: Quadratic([1.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]), ("eigenvalue -1", "positive semi-definite", "pass")),
    (lambda: Problem("lion", TwoWell()), ("lion", "rmsprop, adam, sgd", "choose")),
    (lambda: Noise("cauchy"), ("cauchy", "gaussian", "choose")),
    (lambda: Noise("student_t", dof=2.0), ("dof=2.0", "dof > 2", "pass")),
    (lambda: theory.run_check("weak"), ("'weak'", "weak_order", "leave the name out")),
    (lambda: sde.simulate(reference("sgd"), 0.3, [0.3], paths=1, seed=0), ("0.3", "1/2", "nearest")),
    (lambda: exact.sde_moments(Problem("rmsprop", TwoWell()), np.array([1.0])), ("TwoWell", "Quadratic", "simulate")),
    (lambda: Logistic(features=2).batch(0.6), ("sigma=0.6", "1/sqrt(B)", "nearest")),
])  # fmt: skip
def test_bad_input_is_refused_with_what_is_allowed(build, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as e:
        build()
    for word in words:
        assert word in str(e.value)


# --- the command


@pytest.mark.parametrize("words", [["nonsense"], [""], ["svag", ""], ["--seed", "-1"], ["check=svag"]])
def test_what_cannot_be_run_is_one_message_and_exit_code_2(words, capsys):
    """Fails if an empty name means "every check" (it did), or if a check runs before the others are looked up."""
    assert theory.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "allowed" in err
    assert "--seed" in words or "weak_order" in err


def test_a_missing_package_is_one_sentence_with_the_words_to_install_it():
    """In a fresh interpreter that cannot see numba; fails if the import error of some module comes through instead."""
    code = (
        "import importlib.machinery as m, sys\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "from scaling_exps import cli\n"
        "sys.exit(cli.main(['theory']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["scalerun: theory needs numba: pip install 'scalerun[theory]'"]


def test_command_json_and_figure(capsys, tmp_path):
    assert theory.main(["noise_dominance", "--json", "--out", str(tmp_path)]) == 0
    d = json.loads(capsys.readouterr().out)
    assert {"check", "optimizer", "noise", "eta2", "ell", "kappa", "function", "error", "standard_error"} <= set(
        d["rows"][0]
    )
    assert {"check", "optimizer", "noise", "function", "slope", "interval", "expected", "tolerance", "pass"} <= set(
        d["fits"][0]
    )
    assert (tmp_path / "noise_dominance.png").stat().st_size > 1000
    assert json.loads((tmp_path / "theory.json").read_text()) == d


@pytest.mark.parametrize("module", [theory, oracles, problem, result])
def test_doctests(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_example_of_the_docs_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
    block = page.split("## Your own oracle")[1].split("\n`paired`")[0]
    code = "\n".join(line[4:] for line in block.splitlines() if line.startswith("    "))
    exec(code.replace("paths=4096", "paths=256"), {})
    assert capsys.readouterr().out.count("theta[0]") == 3 * 2  # theta[0] and its square, three steps
