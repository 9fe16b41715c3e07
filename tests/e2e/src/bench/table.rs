//! Rows for people.

use comfy_table::{CellAlignment, Table};
use godwit_model::Bytes;

use super::rows::{Bench, Row, median};

const HEAD: [&str; 11] =
    ["SCENARIO", "LINK", "SYSTEM", "DONE", "SECONDS", "WIRE", "BLACKOUT", "OUTAGE", "CPU", "PAGES/S", "WRONG PAGES"];
/// Columns of words; figures are on the right.
const WORDS: usize = 3;

impl Row {
    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { scenario, system, link, pair, seconds, wire_bytes, outage_ms, cpu_seconds, completed, note, .. } = self;
        let end = if *completed { "done" } else { "NOT DONE" };
        let blackout = self.blackout_ms.map_or("none".to_owned(), |blackout| format!("{blackout:.0} ms"));
        let wrong = self.page_errors.map_or("unknown".to_owned(), |errors| errors.to_string());
        format!(
            "{scenario} {link} {system} #{pair}: {end} in {seconds:.1} s, {} on the wire, blackout {blackout}, outage {outage_ms:.0} ms, \
             CPU {cpu_seconds:.1} s, {} pages/s before and {} during, wrong pages {wrong}; {note}",
            Bytes(*wire_bytes),
            self.pages_per_second,
            self.pages_per_second_moving,
        )
    }
}

impl Bench {
    /// A table: a line for each scenario, link and system, with the medians of its pairs.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING).set_header(HEAD);
        for group in self.groups() {
            table.add_row(line(&group));
        }
        for column in table.column_iter_mut().skip(WORDS) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }
}

fn line(group: &[&Row]) -> Vec<String> {
    let of = |figure: fn(&Row) -> Option<f64>| median(group.iter().filter_map(|row| figure(row)));
    let shown = |figure: Option<f64>, digits: usize, unit: &str| {
        figure.map_or("-".to_owned(), |figure| format!("{figure:.digits$} {unit}"))
    };
    let first = |name: fn(&Row) -> &str| group.first().map_or("", |row| name(row)).to_owned();
    let done = group.iter().filter(|row| row.completed).count();
    let wrong: Option<u64> = group.iter().map(|row| row.page_errors).sum();
    vec![
        first(|row| &row.scenario),
        first(|row| &row.link),
        first(|row| &row.system),
        format!("{done}/{}", group.len()),
        shown(of(|row| Some(row.seconds)), 1, "s"),
        of(|row| Some(row.wire_bytes as f64)).map_or("-".to_owned(), |bytes| Bytes(bytes as u64).to_string()),
        shown(of(|row| row.blackout_ms), 0, "ms"),
        shown(of(|row| Some(row.outage_ms)), 0, "ms"),
        shown(of(|row| Some(row.cpu_seconds)), 1, "s"),
        shown(of(|row| Some(row.pages_per_second as f64)), 0, "").trim_end().to_owned(),
        wrong.map_or("-".to_owned(), |wrong| wrong.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_one_line_of_medians() {
        let row = |seconds, completed| Row {
            scenario: "A".into(),
            system: "godwit".into(),
            link: "1gbit".into(),
            seconds,
            completed,
            page_errors: Some(0),
            ..Row::default()
        };
        let table = Bench { rows: vec![row(1.0, true), row(3.0, true), row(2.0, false)], ..Bench::default() }.table();
        let words: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(words[..6], ["A", "1gbit", "godwit", "2/3", "2.0", "s"], "{table}");
    }
}
