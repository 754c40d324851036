"""Where the time of a training step goes; see parts.py.

python benchmarks/profile.py [--batch 16] [--rounds 5] [--out FILE]
"""

# the standard library has a module of this name, torch imports it, and Python looks in
# a script's folder first
if __name__ == "profile":
    import sysconfig
    from pathlib import Path

    exec(
        compile(
            Path(sysconfig.get_path("stdlib"), "profile.py").read_text(),
            "profile.py",
            "exec",
        )
    )
else:
    from parts import main

    main()
