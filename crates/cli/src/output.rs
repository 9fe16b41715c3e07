//! What goes to standard output (data) and to standard error (everything else).

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::error::Failure;
use crate::text::{is_hostile, safe_json, visible};

/// How data is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// The API's objects as JSON.
    Json,
    /// The API's objects as YAML.
    Yaml,
}

/// Chooses the format.
#[derive(Args, Clone, Default)]
pub(crate) struct OutputArgs {
    /// How data is written
    #[arg(
        short = 'o',
        long = "output",
        global = true,
        value_enum,
        default_value_t,
        value_name = "table|json|yaml",
        hide_possible_values = true,
        help_heading = "Output"
    )]
    pub(crate) output: Format,
}

/// Writes a line to standard error. Nobody may be there to read it, which is no reason to fail.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes text to standard output and ends the line if it is not ended.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    write!(stdout, "{text}{end}").and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Writes data: as it is in the API, or as `table` shows it.
pub(crate) fn print_data<T: Serialize>(format: Format, data: &T, table: impl FnOnce() -> String) -> Result<(), Failure> {
    match format {
        Format::Table => print(&table()),
        Format::Json => print(&json(data)?),
        Format::Yaml => print(&yaml(data)?),
    }
}

/// Writes one object as one line.
pub(crate) fn print_line<T: Serialize>(data: &T) -> Result<(), Failure> {
    let line = serde_json::to_string(data).map_err(|error| Failure::Output(error.into()))?;
    print(&safe_json(&line))
}

fn json<T: Serialize>(data: &T) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(data).map_err(|error| Failure::Output(error.into()))?;
    Ok(safe_json(&text).into_owned())
}

fn yaml<T: Serialize>(data: &T) -> Result<String, Failure> {
    let text = serde_yaml_ng::to_string(data).map_err(|error| Failure::Output(io::Error::other(error)))?;
    // A plain YAML scalar has no escapes. JSON has, and is YAML.
    if text.contains(|character| character != '\n' && is_hostile(character)) { json(data) } else { Ok(text) }
}

/// Columns for people.
pub(crate) struct Table {
    head: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(head: &'static [&'static str]) -> Self {
        Self { head, rows: Vec::new() }
    }

    /// Adds a row; whatever its cells contain is made harmless.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows
            .push(cells.iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { visible(cell).into_owned() }).collect());
    }

    /// The table as text.
    pub(crate) fn render(&self) -> String {
        let head: Vec<String> = self.head.iter().map(|&title| title.to_owned()).collect();
        let mut widths = vec![0; head.len()];
        for row in std::iter::once(&head).chain(&self.rows) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in std::iter::once(&head).chain(&self.rows) {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// One object for people: a line per fact.
#[derive(Default)]
pub(crate) struct Facts {
    lines: Vec<(String, String)>,
}

impl Facts {
    /// Adds a fact; an empty one is left out.
    pub(crate) fn fact(&mut self, what: &str, value: impl ToString) -> &mut Self {
        let value = value.to_string();
        if !value.is_empty() {
            self.lines.push((what.to_owned(), visible(&value).into_owned()));
        }
        self
    }

    /// The facts as text.
    pub(crate) fn render(&self) -> String {
        let width = self.lines.iter().map(|(what, _)| what.chars().count()).max().unwrap_or_default() + 1;
        self.lines.iter().map(|(what, value)| format!("{:width$}  {value}\n", format!("{what}:"))).collect()
    }
}

/// A value that may be absent, for a cell.
pub(crate) fn or_nothing<T: ToString>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// The word that serde has for a plain enum variant.
pub(crate) fn word<T: Serialize>(variant: &T) -> String {
    serde_json::to_value(variant).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_hold_nothing_hostile() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["web1".into(), "running".into()]);
        table.row(["a-long-name".into(), String::new()]);
        table.row(["x".into(), "\u{1b}[2J".into()]);
        assert_eq!(table.render(), "NAME         STATE\nweb1         running\na-long-name  -\nx            \\u{1b}[2J\n");
    }

    #[test]
    fn facts_line_up_and_the_empty_ones_are_left_out() {
        let mut facts = Facts::default();
        facts.fact("Name", "web1").fact("Host", "").fact("Memory", "1 GiB");
        assert_eq!(facts.render(), "Name:    web1\nMemory:  1 GiB\n");
    }

    #[test]
    fn yaml_that_could_not_escape_becomes_json() {
        let plain = yaml(&serde_json::json!({ "name": "web1" })).expect("YAML");
        assert_eq!(plain, "name: web1\n");
        let hostile = serde_json::json!({ "name": "a\u{202e}b" });
        let text = yaml(&hostile).expect("YAML");
        assert!(!text.contains('\u{202e}'));
        assert_eq!(serde_yaml_ng::from_str::<serde_json::Value>(&text).expect("is YAML too"), hostile);
    }
}
