PY := .venv/bin/python
STAMP := .venv/.installed
SPREAD := --numprocesses=3 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test slow check docs dist bench lock clean

$(STAMP): requirements.lock pyproject.toml
	test -x $(PY) || $${PYTHON:-python3} -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e '.[dev]'
	touch $@

demo: $(STAMP) ## sweep the embedded default over batch sizes x seeds x rules, and report
	.venv/bin/scalerun experiment=demo launch.parallel=2
	.venv/bin/scalerun report runs --out report

test: $(STAMP) ## the tests, but for those of `slow`: under ten minutes on two quiet cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slurm and not slow" $(SPREAD)
	$(PY) -m pytest -m "slurm and not slow" # alone: its cluster wants the machine

slow: $(STAMP) ## the tests that take longest: drills, benches, examples, small experiments. CI runs both
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow and not slurm" $(SPREAD)
	$(PY) -m pytest -m "slurm and slow"

check: $(STAMP) ## format, lint, types, rooms
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports

docs: $(STAMP) ## the site, into site/; a broken link ends it
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

dist: $(STAMP) ## wheel and sdist, checked; the Dockerfile, linted
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	rm -rf dist
	$(PY) -m hatchling build
	$(PY) -m twine check --strict dist/*
	.venv/bin/hadolint Dockerfile

bench: $(STAMP) ## our loop against bare loops, noise, start-up, planning, report
	$(PY) bench/loop.py
	$(PY) bench/noise.py
	$(PY) bench/startup.py
	$(PY) bench/report.py

lock: ## names and versions only, of a fresh environment
	$${PYTHON:-python3} -m venv .venv/lock
	.venv/lock/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	.venv/lock/bin/pip freeze --exclude-editable | sed 's/+[^ ]*$$//' | grep -E '^[A-Za-z0-9_.-]+==' > requirements.lock
	rm -rf .venv/lock

clean:
	rm -rf .venv runs report dist site
