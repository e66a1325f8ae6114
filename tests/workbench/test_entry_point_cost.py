from workbench.bench.entry_point_cost import main, measure


def test_every_process_is_measured():
    costs = measure(2)
    assert len(costs) == 2
    assert all(cost.importing > 0 and cost.activating > 0 for cost in costs)
    assert costs[0].total == costs[0].importing + costs[0].activating


def test_figures_are_printed(capsys):
    main(["--runs", "1"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["import", "activate", "together"]
