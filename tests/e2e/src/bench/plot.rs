//! Rows as a picture: a panel for each figure, a group of bars for each scenario and link, a colour for each system.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::rows::{Bench, Row, median};
use super::system::System;

const WIDTH: u32 = 1520;
const PANEL: u32 = 260;
const MARGIN: i32 = 60;
const LEGEND: i32 = 40;
/// Space of a group's name below its bars.
const FOOT: i32 = 40;
/// Space between groups, in bars.
const GAP: f64 = 1.5;
const TICKS: u32 = 4;
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(150, 150, 150),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

type Figure = fn(&Row) -> Option<f64>;
const FIGURES: [(&str, Figure); 4] = [
    ("seconds", |row| Some(row.seconds)),
    ("MiB on the wire", |row| Some(row.wire_bytes as f64 / f64::from(1 << 20))),
    ("outage, ms", |row| Some(row.outage_ms)),
    ("CPU seconds", |row| Some(row.cpu_seconds)),
];

/// One bar.
struct Bar {
    system: String,
    figure: f64,
    completed: bool,
}

impl Bench {
    /// Draws medians as SVG; bars of moves of which one did not come to its end are hollow.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn plot(&self, path: &Path) -> Result<()> {
        let height = PANEL * FIGURES.len() as u32 + LEGEND as u32;
        let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let (legend, panels) = area.split_vertically(LEGEND);
        self.draw_legend(&legend)?;
        for ((title, figure), panel) in FIGURES.iter().zip(panels.split_evenly((FIGURES.len(), 1))) {
            draw_panel(&panel, title, &self.bars(*figure)).with_context(|| format!("draw {title}"))?;
        }
        area.present().with_context(|| path.display().to_string())
    }

    /// By scenario and link.
    fn bars(&self, figure: Figure) -> Vec<(String, Vec<Bar>)> {
        let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
        for rows in self.groups() {
            let Some(first) = rows.first() else { continue };
            let name = format!("{} {}", first.scenario, first.link);
            let bar = Bar {
                system: first.system.clone(),
                figure: median(rows.iter().filter_map(|row| figure(row))).unwrap_or_default(),
                completed: rows.iter().all(|row| row.completed),
            };
            match groups.last_mut() {
                Some((last, bars)) if *last == name => bars.push(bar),
                _ => groups.push((name, vec![bar])),
            }
        }
        groups
    }

    fn draw_legend<DB: DrawingBackend>(&self, area: &DrawingArea<DB, plotters::coord::Shift>) -> Result<()>
    where
        DB::ErrorType: 'static,
    {
        const STEP: i32 = 180;
        let used = |system: &System| self.rows.iter().any(|row| row.system == system.as_str());
        for (place, system) in System::ALL.into_iter().filter(used).enumerate() {
            let (x, y) = (MARGIN + place as i32 * STEP, LEGEND / 2);
            let colour = colour(system.as_str());
            area.draw(&Rectangle::new([(x, y - 6), (x + 12, y + 6)], colour.filled()))?;
            area.draw(&Text::new(system.to_string(), (x + 18, y), font(13, HPos::Left)))?;
        }
        Ok(())
    }
}

fn draw_panel<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    title: &str,
    groups: &[(String, Vec<Bar>)],
) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let (width, height) = area.dim_in_pixel();
    let (left, right, top, bottom) = (MARGIN, width.cast_signed() - 20, 30, height.cast_signed() - FOOT);
    let most = groups.iter().flat_map(|(_, bars)| bars).map(|bar| bar.figure).fold(0.0, f64::max);
    let scale = nice(most);
    let y_of = |figure: f64| bottom - (figure / scale * f64::from(bottom - top)).round() as i32;
    area.draw(&Text::new(title.to_owned(), (left, 12), font(15, HPos::Left)))?;
    for tick in 0..=TICKS {
        let figure = scale * f64::from(tick) / f64::from(TICKS);
        let y = y_of(figure);
        area.draw(&PathElement::new([(left, y), (right, y)], RGBColor(220, 220, 220)))?;
        area.draw(&Text::new(format!("{figure}"), (left - 6, y), font(12, HPos::Right)))?;
    }
    let places: f64 = groups.iter().map(|(_, bars)| bars.len() as f64 + GAP).sum();
    let unit = f64::from(right - left) / places.max(1.0);
    let mut x = f64::from(left) + unit * GAP / 2.0;
    for (name, bars) in groups {
        let middle = x + unit * bars.len() as f64 / 2.0;
        for bar in bars {
            let corners = [(x.round() as i32 + 1, y_of(bar.figure)), ((x + unit).round() as i32 - 1, bottom)];
            let colour = colour(&bar.system);
            let style = if bar.completed { colour.filled() } else { colour.stroke_width(2) };
            area.draw(&Rectangle::new(corners, style))?;
            x += unit;
        }
        x += unit * GAP;
        area.draw(&Text::new(name.clone(), (middle as i32, bottom + 16), font(12, HPos::Center)))?;
    }
    Ok(())
}

fn font(size: u32, horizontal: HPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&BLACK).pos(Pos::new(horizontal, VPos::Center))
}

fn colour(system: &str) -> RGBColor {
    let place = System::ALL.into_iter().position(|known| known.as_str() == system).unwrap_or_default();
    COLOURS.get(place).copied().unwrap_or(BLACK)
}

/// The next of 1, 2, 4, 8, 10 and so on.
fn nice(most: f64) -> f64 {
    let magnitude = 10_f64.powf(most.max(1e-6).log10().floor());
    [1.0, 2.0, 4.0, 8.0, 10.0].map(|step| step * magnitude).into_iter().find(|scale| *scale >= most).unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_and_system_is_drawn() {
        let row = |scenario: &str, system: System, completed| Row {
            scenario: scenario.into(),
            system: system.as_str().into(),
            link: "1gbit".into(),
            seconds: 7.0,
            completed,
            ..Row::default()
        };
        let rows = vec![row("A", System::Godwit, true), row("A", System::Precopy, false), row("R", System::Godwit, true)];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plot.svg");
        Bench { rows, ..Bench::default() }.plot(&path).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        for words in ["<svg", "A 1gbit", "R 1gbit", "qemu-precopy", "MiB on the wire"] {
            assert!(text.contains(words), "{words}");
        }
    }

    #[test]
    fn scales_are_round() {
        for (most, scale) in [(0.7, 0.8), (1.0, 1.0), (7.0, 8.0), (180.0, 200.0), (900.0, 1000.0)] {
            assert!((nice(most) - scale).abs() < 1e-9, "{most}");
        }
    }
}
