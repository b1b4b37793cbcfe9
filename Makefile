# make demo    installs, compresses a photograph with the shipped weights, measures it, trains for a minute
# make test    installs and runs the tests (two to eight minutes on two cores)
# make lint    checks style, types, and which room imports which
# make wheel   builds the wheel, and codes a picture with it in an environment that has nothing else

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint wheel clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	rm -rf demo/runs
	mkdir -p demo/photos
	cp $$($(BIN)/python -c "import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / 'data')")/{coffee,astronaut,chelsea}.png demo/photos
	$(BIN)/rnncodec encode demo/photos/coffee.png demo/coffee.rnc
	$(BIN)/rnncodec info demo/coffee.rnc
	$(BIN)/rnncodec truncate demo/coffee.rnc demo/coffee-small.rnc --iterations 4
	$(BIN)/rnncodec decode demo/coffee-small.rnc demo/coffee-decoded.png
	$(BIN)/python evaluate.py demo/photos/coffee.png --save-images --baselines jpeg webp --output demo/results
	$(BIN)/python train.py fit --config configs/debug.yaml --data.root demo/photos --data.cache_dir demo/cache \
		--data.val_images 1 --trainer.default_root_dir demo/runs --trainer.max_steps -1 --trainer.max_time 00:00:01:00
	@echo
	@echo "Look at demo/results/report.html, demo/results/coffee_comparison.png and demo/results/rate_distortion.png"

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

lint: $(VENV)/installed
	$(INSTALL) --editable '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# From nothing: what an earlier build left in build/ would become part of the wheel.
wheel:
	rm -rf build dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && PATH="$$PWD/bare/bin:$$PATH" && \
		python -c "from PIL import Image; Image.radial_gradient('L').convert('RGB').resize((200, 120)).save('a.png')" && \
		rnncodec encode a.png a.rnc --iterations 4 && rnncodec info a.rnc && rnncodec decode a.rnc b.png && \
		python -c "from PIL import Image; assert Image.open('b.png').size == (200, 120)"

clean:
	rm -rf $(VENV) build demo dist
