//! `godwit vm history`: every generation of a VM, where and when it ran, and why.

use godwit_api::v1::VmHistory;
use godwit_model::Name;

use crate::error::Failure;
use crate::output::{Table, or_nothing, print_data, word};
use crate::session::Session;
use crate::text::{moment, visible};

pub(super) async fn run(session: &Session, name: &Name) -> Result<(), Failure> {
    let history = session.client.vm_history(name).await?;
    print_data(session.format, &history, || show(&history))
}

fn show(history: &VmHistory) -> String {
    let mut table = Table::new(&["GENERATION", "HOST", "FROM", "UNTIL", "END", "BLACKOUT", "PREDICTED", "FOR", "BY", "REASON"]);
    for reign in &history.generations {
        table.row([
            reign.generation.to_string(),
            reign.host.to_string(),
            or_nothing(reign.began.map(moment)),
            or_nothing(reign.ended.map(moment)),
            or_nothing(reign.end.map(|end| word(&end))),
            or_nothing(reign.figures.map(|figures| figures.blackout)),
            or_nothing(reign.figures.and_then(|figures| figures.predicted_blackout)),
            visible(&reign.kind).into_owned(),
            visible(&reign.principal).into_owned(),
            reign.reason.as_ref().map(|reason| visible(reason).into_owned()).unwrap_or_default(),
        ]);
    }
    table.render()
}
