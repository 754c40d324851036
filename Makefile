# Every target sets up what it needs; nothing is redone unless its inputs changed.
#   make demo                     concat and mla on the embedded dataset: two executed notebooks and a table
#   make demo DATASET=digits ARCHIVE=free-spoken-digit-dataset.zip      the same on real recordings
#   make demo DATASET=cremad [ROOT=CREMA-D]     the same on CREMA-D, or without ROOT on a synthetic miniature of it;
#                                               also food101, mvsa, iemocap, kinetics
#   make demo DATASET=iemocap ENCODER=features [FEATURES=SPEC]     encoders run over the dataset once, both methods train on
#                                               what they make; without FEATURES the encoders are small and random
#   make demo DATASET=iemocap ENCODER=m3ae      masked autoencoders of the size SIZE=small; sound is read by CAV-MAE
#   make paper DATASET=cremad ROOT=CREMA-D     the paper's table: every method, tuned, five seeds, and a report
#   make test                     every test, and every chapter
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
DEPS    := $(VENV)/.deps
READY   := $(VENV)/.ready
UV      := uv==0.13.9
WORKERS ?= 2

DATASET ?= synthetic
METHODS ?= concat mla
ENCODER ?= small
# ENCODER=m3ae: M3AE does not read audio, so CAV-MAE does; from scratch, a few epochs at a rate that transformers bear
SIZE    ?= small
M3AE_iemocap   := audio=cavmae(size=$(SIZE)),video=m3ae(size=$(SIZE)),text=m3ae(size=$(SIZE))
M3AE_cremad    := audio=cavmae(size=$(SIZE)),video=m3ae(size=$(SIZE))
M3AE_kinetics  := $(M3AE_cremad)
M3AE_digits    := audio=cavmae(size=$(SIZE)),image=m3ae(size=$(SIZE))
M3AE_synthetic := audio=cavmae(size=$(SIZE)),visual=m3ae(size=$(SIZE)),text=m3ae(size=$(SIZE))
ifeq ($(ENCODER),m3ae)
SPEC   := $(or $(M3AE_$(DATASET)),m3ae(size=$(SIZE)))
EPOCHS ?= 3
LR     ?= 0.01
else
SPEC   := $(ENCODER)
endif
EPOCHS  ?= 20
SEED    ?= 0
ARCHIVE ?=
ROOT    ?=
# the encoders of ENCODER=features, e.g. hf:openai/clip-vit-base-patch32; small: made here, with random weights
FEATURES ?= small
DOWNLOAD ?=
DEMO    := runs/demo
# what is passed to data_scripts/prepare_digits.py, and the same options for the run
DIGITS  := --split speaker --image_noise 0.5
ifeq ($(DATASET),digits)
DATASET_ARGS ?= split=speaker,image_noise=0.5
endif
# the datasets that a preparation script makes from an official download, or from a synthetic miniature of it
MEDIA := cremad food101 mvsa iemocap kinetics
ifneq ($(filter $(DATASET),$(MEDIA)),)
LR ?= 0.1
MADE := $(if $(ROOT),,miniature)
ifeq ($(ENCODER),features)
DATASET_ARGS ?= variant=$(if $(MADE),$(MADE)-)features
endif
DATASET_ARGS ?= $(if $(MADE),variant=$(MADE))
BATCH ?= $(if $(ROOT),64,16)
endif
SPLIT ?=
TRAIN := $(if $(LR),-p lr $(LR)) $(if $(BATCH),-p batch_size $(BATCH))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DELETE_ON_ERROR:
.PHONY: help setup paper check-paper prepare-paper lint format demo features prepare-synthetic prepare-digits $(MEDIA:%=prepare-%) params gpu test soak solutions browser site pdf lab chapter export clean readme check-python lock benchmark results

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/ -/'

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mla_nb needs Python 3.11 or newer; %s is %s: make PYTHON=python3.11 ..." % ("$(PYTHON)", sys.version.split()[0]))'

$(DEPS): constraints.txt | check-python
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(UV) && $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r constraints.txt \
	  || $(BIN)/python -m pip install -q -r constraints.txt
	touch $@
$(READY): $(DEPS) setup.py settings.ini pyproject.toml
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --config-settings editable_mode=compat -e .      # compat: found also from the folder above, if the clone is called mla_nb, too
	touch $@

setup: $(READY) ## the environment in .venv

# make paper: the whole table of a dataset. Without ROOT= on a synthetic miniature, with the preset small.
PRESET  ?= $(if $(ROOT),paper,small)
SEEDS   ?= 0:5
TUNING  ?= 100:103
RATES   ?= auto
comma   := ,
empty   :=
space   := $(empty) $(empty)
given    = $(if $(filter-out file undefined,$(origin $(1))),--$(2) '$($(1))')
PAPER   := runs/paper/$(DATASET)-$(PRESET)$(if $(filter features,$(ENCODER)),-features)
# what a preset stores lies beside what make demo has prepared
KEEP    := $(if $(filter features,$(ENCODER)),,$(if $(ROOT),$(filter paper,$(PRESET))))
WHAT    := $(or $(DATASET_ARGS),$(if $(KEEP),variant=$(KEEP)))
WHICH   := $(if $(filter-out file,$(origin METHODS)),$(METHODS),all)
GRID     = $(BIN)/mla grid --dataset '$(DATASET)$(if $(WHAT),($(WHAT)))' --preset $(PRESET) \
	  --method '$(subst $(space),$(comma),$(strip $(WHICH)))' --seed $(SEEDS) --lr $(RATES) --tune_seed $(TUNING) --root $(PAPER) \
	  $(call given,EPOCHS,epochs) $(call given,ENCODER,encoder) $(call given,MEASURE,measure) $(call given,JOBS,jobs) \
	  $(or $(call given,BATCH,batch_size),$(if $(MADE),--batch_size 16))
paper: check-paper $(if $(filter features,$(ENCODER)),features,$(if $(filter $(DATASET),$(MEDIA)),prepare-paper,prepare-$(DATASET))) ## every method, rate and seed on a dataset, ending in a report: make paper DATASET=cremad ROOT=CREMA-D [SPLIT=...] [METHODS=concat,mla] [SEEDS=0:2]
	$(GRID)
	$(BIN)/python tools/nbs.py papermill --log-level WARNING nbs/experiments/compare.ipynb $(PAPER)/compare.ipynb -k python3 -p root $(PAPER)
	@echo; echo "the report: $(PAPER)/compare.ipynb"
check-paper: $(READY)      # a mistyped name is told before an hour of preparation
	@$(GRID) --check
prepare-paper: $(READY)
	$(BIN)/python data_scripts/prepare_$(DATASET).py --preset $(PRESET) $(if $(KEEP),--variant $(KEEP)) \
	  $(if $(ROOT),--root '$(ROOT)' $(if $(SPLIT),--split $(SPLIT)),--miniature)

demo: prepare-$(DATASET) $(if $(filter features,$(ENCODER)),features) ## concat and mla, start to end: executed notebooks in runs/demo/ and a table
	@mkdir -p $(DEMO)
	@set -e; for m in $(METHODS); do \
	  echo "== $$m on $(DATASET): $(DEMO)/$(DATASET)-$$m.ipynb"; \
	  $(BIN)/python tools/nbs.py papermill --log-level WARNING --progress-bar nbs/experiments/run.ipynb $(DEMO)/$(DATASET)-$$m.ipynb -k python3 \
	    -p dataset $(DATASET) -p method $$m -p encoder '$(SPEC)' -p epochs $(EPOCHS) -p seed $(SEED) $(TRAIN) \
	    -r dataset_args '$(DATASET_ARGS)' -p root $(DEMO)/$(DATASET); \
	done
	@echo; $(BIN)/mla table $(DEMO)/$(DATASET) --plot $(DEMO)/$(DATASET)/accuracies.png
	@echo; echo "the same as a picture, a panel per run: $(DEMO)/$(DATASET)/accuracies.png"
	@echo "(laziness: under concat a modality stays far below what is possible, or below what it reaches under mla)"
	@echo; echo "the runs, for mla predict and mla doctor:"; ls -d $(DEMO)/$(DATASET)/*/

features: prepare-$(DATASET) ## encoders run over a prepared dataset once: make features DATASET=iemocap FEATURES=SPEC
	$(BIN)/python data_scripts/extract_features.py --dataset '$(DATASET)' $(if $(MADE),--variant $(MADE)) --encoder '$(FEATURES)' $(if $(FORCE),--force)

prepare-synthetic: $(READY)
prepare-digits: $(READY)
	$(if $(ARCHIVE)$(ROOT)$(DOWNLOAD),$(BIN)/python data_scripts/prepare_digits.py $(DIGITS) \
	  $(if $(ARCHIVE),--archive '$(ARCHIVE)',$(if $(ROOT),--root '$(ROOT)',--download)),\
	  @test -e data/digits-speaker-noise0.5/dataset.json || { echo "make demo DATASET=digits needs the recordings: add ARCHIVE=FILE.zip, ROOT=DIR or DOWNLOAD=1 (see data_scripts/prepare_digits.py)"; exit 1; })
$(MEDIA:%=prepare-%): prepare-%: $(READY)
	$(BIN)/python data_scripts/prepare_$*.py $(if $(ROOT),--root '$(ROOT)' $(if $(SPLIT),--split $(SPLIT)),--miniature)
prepare-%: $(READY)
	@$(BIN)/python -c "from mla_nb.core import datasets, discover, unknown; discover(); raise SystemExit(str(unknown('dataset', '$*', datasets)) if '$*' not in datasets else '$* has no demo; see data_scripts/prepare_$*.py --help')"

lint: $(READY) ## layout and lint of notebooks, package and tests; which wing may import which
	$(BIN)/ruff format --check nbs tests tools benchmarks results data_scripts docs setup.py
	$(BIN)/ruff check nbs mla_nb tests tools benchmarks results data_scripts docs setup.py
	$(BIN)/lint-imports

format: $(READY) ## lay everything out again: ruff format, sorted imports
	$(BIN)/ruff check -q --select I --fix nbs tests tools benchmarks results data_scripts
	$(BIN)/ruff format nbs tests tools benchmarks results data_scripts docs setup.py

test: $(READY) lint ## lint, every test, every chapter, README in step
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/python tools/nbs.py test -j$(WORKERS)
	$(BIN)/python tools/nbs.py readme --check

soak: $(READY) ## kills, damaged bytes, full disks, odd input, for minutes: the table in results/faults.md
	OMP_NUM_THREADS=1 FAULTS_TABLE=results/faults.json $(BIN)/python -m pytest -q -m 'soak or not soak' tests/test_faults.py
	@cat results/faults.md

solutions: $(READY) ## run the exercises' solutions after their chapters (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tools/nbs.py solutions

browser: $(READY) ## chapters in a real JupyterLab and pages of the site, driven by Chromium (CHROMIUM=/usr/bin/chromium, MLA_SHOTS=FOLDER keeps screenshots)
	$(BIN)/python -m pytest -q -m browser tests/test_browser.py tests/test_pages.py

lab: $(READY) ## JupyterLab on the chapters
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --MappingKernelManager.transport_encryption=auto --notebook-dir=. nbs/index.ipynb

chapter: $(READY) ## execute chapters in place: make chapter N=10
	$(if $(N),$(BIN)/python tools/nbs.py run $(N),@echo "which one? make chapter N=10"; exit 1)

export: $(READY) ## notebooks -> mla_nb/, and the index of all names
	$(BIN)/nbdev_export
	$(BIN)/python tools/index.py
readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/python tools/nbs.py readme
clean: $(READY) ## store the notebooks without execution counts and stray metadata
	$(BIN)/nbdev_clean
benchmark: $(READY) ## where the time goes; the cost of a step, an epoch and every method against the bare encoders; of reading, and of an answer
	$(BIN)/python benchmarks/profile.py
	$(BIN)/python benchmarks/epoch.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/input.py
	$(BIN)/python benchmarks/waits.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory_media.py
	$(BIN)/python benchmarks/predict.py
gpu: $(READY) ## every dataset's preset at full size, and steps in fp32, bf16, compiled, into results/gpu.json (on a machine with a GPU)
	$(BIN)/python benchmarks/gpu.py
site: $(READY) ## the chapters and the API as a web site in _site/html/
	$(BIN)/python tools/site.py build
	$(BIN)/python tools/site.py check
pdf: site ## Part I as _site/html/part-1.pdf, printed by Chromium
	$(BIN)/python tools/site.py pdf
params: $(READY) ## parameter files for papermill, one per dataset and preset
	$(BIN)/python tools/params.py
results: $(READY) ## the runs behind part V, hours; goes on where it was stopped: make results [ARCHIVE= MVSA= EMODB= STAMPS= IMAGE= TEXT=] [ONLY=lazy,digits] [ALL=1]
	$(if $(ARCHIVE)$(MVSA)$(EMODB)$(STAMPS),$(BIN)/python results/sources.py --archive '$(ARCHIVE)' --mvsa '$(MVSA)' \
	  --emodb '$(EMODB)' --stamps '$(STAMPS)' --image '$(IMAGE)' --text '$(TEXT)')
	OMP_NUM_THREADS=1 $(BIN)/python results/study.py --jobs $(WORKERS) --only '$(ONLY)' $(if $(ALL),--all)
lock: $(DEPS) ## constraints.txt from requirements.in, for the oldest Python that is promised
	$(BIN)/uv pip compile -q --no-annotate --no-header --upgrade --python-version 3.11 requirements.in -o constraints.txt
