# make demo    train a small model on the CPU, show its table and picture (seconds, after installation)
# make demo-mpi3d   draw stand-in images, write captions, train on a selection and a perturbation bias (minutes)
# make test    run the test suite in two processes, or JOBS=4            make lint    check the style
# make test-processors   run the numerical tests as processors with other instructions and numbers of threads compute
# make test-oldest   run the test suite with the oldest versions that pyproject.toml promises, in .venv-oldest (6 GB)
# make bench-small   run all that benchmarks/gpu.py measures, at a small size on the CPU
# make torture stop, fail, damage and race the scripts (about half an hour); make torture-small: a sample, in two minutes
# make bench   time what benchmarks/README.md quotes
# make blender install Blender as a Python package into .venv-blender, for the images of Causal3DIdent (Python 3.11)
# make demo-causal3dident      render 900 small images with captions, train on a selection and a perturbation bias
# make audit   look for known vulnerabilities of what is installed (asks a service on the network)
# Each creates .venv and installs what is missing, once. PYTHON=python3.12 make demo picks another interpreter.
# ENV=$CONDA_PREFIX make demo takes an environment that is there, with the PyTorch in it, and installs nothing.

JOBS ?= 2
PYTHON ?= python3
PYTHON311 ?= python3.11
# to shells ENV is a file that they read first, and clusters set it: that is no environment
ifneq ($(and $(ENV),$(wildcard $(ENV)/.)),)
ifeq ($(wildcard $(ENV)/bin/python),)
$(error ENV=$(ENV) holds no bin/python)
endif
BIN := $(ENV)/bin
INSTALLED :=
else
BIN := .venv/bin
INSTALLED := .venv/.installed
endif
BLENDER := .venv-blender/bin/python
BLENDER_INSTALLED := .venv-blender/.installed
CAUSAL3DIDENT := rendering_data/Causal3DIdent

.PHONY: install blender demo demo-mpi3d demo-causal3dident test test-processors test-oldest lint audit bench bench-small torture torture-small
.DELETE_ON_ERROR:

install: $(INSTALLED)

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

define python311
@$(PYTHON311) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "error: $(1) Python 3.11, and $(PYTHON311) is not there; name one: make $(2) PYTHON311=/path/to/python3.11" >&2; exit 2; }
endef

blender: $(BLENDER_INSTALLED)

$(BLENDER_INSTALLED): $(CAUSAL3DIDENT)/requirements.txt
	$(call python311,Blender's package needs,blender)
	@test -x $(BLENDER) || $(PYTHON311) -m venv .venv-blender
	$(BLENDER) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python main_numeric.py --recipe fast --no-cuda --semantics-n 4 --modality-n 2 --theta-value 10 --beta-value 2 \
		--train-steps 600 --batch-size 256 --final-batch-size 512 --log-steps 200 --num-eval-batches 2 --mlp-eval --seed 0 --model-id demo --overwrite

STANDIN := data/demo-mpi3d
MPI3D_DEMO := main_mpi3dreal.py --datapath $(STANDIN) --recipe fast --no-cuda --batch-size 32 --train-steps 1500 --norm-penalty 3 --log-steps 100 --seed 0 --overwrite

demo-mpi3d: $(INSTALLED)
	$(BIN)/python rendering_data/MPI3D/render_standin_images.py --output-dir $(STANDIN) --size 32 --overwrite
	$(BIN)/python rendering_data/MPI3D/render_multimodal_mpi3d.py --output-dir $(STANDIN) --overwrite
	$(BIN)/python $(MPI3D_DEMO) --bias-type selection --bias-id 0 --model-id demo_mpi3d_selection
	$(BIN)/python $(MPI3D_DEMO) --bias-type perturbation --bias-id 4 --model-id demo_mpi3d_perturbation
	$(BIN)/python rendering_data/MPI3D/show_pairs.py --datapath $(STANDIN) --output models/demo_mpi3d_pairs.png

CAUSAL_STANDIN := data/demo-causal3dident
CAUSAL_DEMO := main_causal3dident.py --datapath $(CAUSAL_STANDIN) --recipe fast --optimiser adam --spare-dimensions 0 --first-batch-size 0 --no-cuda --train-steps 300 --log-steps 100 --seed 0 --overwrite

demo-causal3dident: $(INSTALLED) $(BLENDER_INSTALLED)
	$(BIN)/python $(CAUSAL3DIDENT)/generate_latents.py --output-folder $(CAUSAL_STANDIN) --n-points 900 --seed 0
	$(BIN)/python $(CAUSAL3DIDENT)/generate_text.py --output-folder $(CAUSAL_STANDIN)
	$(BLENDER) $(CAUSAL3DIDENT)/generate_images.py --output-folder $(CAUSAL_STANDIN) --size 64 --samples 32
	$(BIN)/python $(CAUSAL3DIDENT)/contact_sheet.py --output-folder $(CAUSAL_STANDIN)
	$(BIN)/python $(CAUSAL_DEMO) --bias-type selections --bias-id 2 --model-id demo_causal3dident_selections
	$(BIN)/python $(CAUSAL_DEMO) --bias-type perturbations --bias-id 4 --model-id demo_causal3dident_perturbations

# Without Python 3.11, or where Blender's package cannot be had, the tests that render are skipped.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory blender || echo "the tests that render Causal3DIdent are skipped"
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

NUMERICAL := $(addprefix tests/test_,losses.py latent_spaces.py encoders.py optimisation.py probes.py eval_numeric_predict.py training.py main_numeric.py)
PROCESSORS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=4

test-processors: $(INSTALLED)
	@set -e; for setting in $(PROCESSORS); do echo "$$setting"; env $$setting $(BIN)/python -m pytest --durations=0 --durations-min=30 $(NUMERICAL); done
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest --durations=0 --durations-min=30 -k killed tests/test_training.py tests/test_main_*.py

OLDEST := .venv-oldest/bin/python
LOWEST := import tomllib; print(*(bound.replace(">=", "==") for bound in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))

# Matplotlib 3.8 calls what later releases of pyparsing warn of.
.venv-oldest/.installed: pyproject.toml requirements.txt
	$(call python311,the oldest versions need,test-oldest)
	@test -x $(OLDEST) || $(PYTHON311) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --disable-pip-version-check $$($(PYTHON311) -c '$(LOWEST)') "pyparsing<3.2" \
		$$(sed -n 's/^\(hypothesis\|nltk\|pytest[a-z-]*\)\(==[0-9.]*\).*/\1\2/p' requirements.txt)
	@touch $@

test-oldest: .venv-oldest/.installed
	$(OLDEST) -m pytest -n $(JOBS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

AUDIT := report/audit/bin

audit: $(INSTALLED)
	@test -x $(AUDIT)/pip-audit || { $(BIN)/python -m venv report/audit && $(AUDIT)/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	@$(AUDIT)/pip-audit --strict --no-deps --disable-pip -r requirements.txt || { echo "error: a known vulnerability, or one that could not be looked for: pip-audit says above which; it asks a service on the network" >&2; exit 2; }

bench-small: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu.py --device cpu --small --output report/gpu.md

torture: $(INSTALLED)
	$(BIN)/python torture/run.py

torture-small: $(INSTALLED)
	$(BIN)/python torture/run.py --each 1

bench: $(INSTALLED)
	$(BIN)/python benchmarks/numeric_step.py
	$(BIN)/python benchmarks/numeric_eval.py --krr
	$(BIN)/python benchmarks/numeric_downstream.py
