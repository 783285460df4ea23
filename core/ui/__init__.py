"""Streamlit pieces shared by the pages.

frame.start(title)                 page setup and sidebar; call first on every page
frame.link(page, label)            a link to another page
frame.step(page, label)            the same, as the page's main button
state.workspace()                  the workspace of this dashboard
state.active_checkpoint()          the active checkpoint; if there is none, asks for one and stops
state.set_checkpoint(name)         make a checkpoint the active one
state.inspect(name)                its CheckpointInfo, cached; shows the error and stops
forms.Form(command, checkpoint)    widgets of a command's options, which keep their values
runs.launch_once(command, values)  start a run; a second click, in any tab, starts nothing
runs.show(run_id)                  a run's live progress, cancel, log and command
runs.show_all(command, started)    the same for every live run of a command, after a refresh too
state.names()                      what runs and checkpoints are called
runs.pick(command, runs, label)    choose among past runs; kept in the URL as ?run=
form.fields(spec_class, names)     widgets from a spec's fields, with its help texts
"""
